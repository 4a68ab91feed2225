"""Tensor parallelism: one model over several processes ("ranks"), a device each."""

from .group import Group, thread_share
from .head import SlicedHead
from .ranks import Link, Ranks, Seat
from .wire import Skeleton, take_apart

__all__ = [
    "Group",
    "Link",
    "Ranks",
    "Seat",
    "Skeleton",
    "SlicedHead",
    "take_apart",
    "thread_share",
]
