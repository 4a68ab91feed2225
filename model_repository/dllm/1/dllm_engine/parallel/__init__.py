"""Tensor parallelism: one model over several processes ("ranks"), a device each."""

from .alarm import Alarm
from .group import Group, thread_share
from .head import SlicedHead
from .ranks import Link, Ranks, Seat
from .wire import Skeleton, take_apart

__all__ = [
    "Alarm",
    "Group",
    "Link",
    "Ranks",
    "Seat",
    "Skeleton",
    "SlicedHead",
    "take_apart",
    "thread_share",
]
