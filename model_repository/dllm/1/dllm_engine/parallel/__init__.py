"""Tensor parallelism: splits one model over several processes (ranks) with a device each."""

from dllm_engine.parallel.group import Group, thread_share
from dllm_engine.parallel.head import SlicedHead
from dllm_engine.parallel.ranks import RankConnection, Ranks
from dllm_engine.parallel.wire import PackedObject, pack_tensors

__all__ = [
    "Group",
    "PackedObject",
    "RankConnection",
    "Ranks",
    "SlicedHead",
    "pack_tensors",
    "thread_share",
]
