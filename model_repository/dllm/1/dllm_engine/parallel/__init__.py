"""Tensor parallelism: one model over several processes ("ranks"), a device each."""

from dllm_engine.parallel.group import Group, thread_share
from dllm_engine.parallel.head import SlicedHead
from dllm_engine.parallel.ranks import Link, Ranks, Seat
from dllm_engine.parallel.wire import Skeleton, take_apart

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
