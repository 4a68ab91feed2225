"""Memory: the plan made at start, the pages of keys and values, and what each policy keeps."""

from dllm_engine.memory.cache_policy import (
    LEAST_KEPT,
    CachePolicy,
    Phases,
    delayed_rows,
    kept_rows,
    reserved_rows,
)
from dllm_engine.memory.kv_cache import KVPages, PageAllocator

__all__ = [
    "LEAST_KEPT",
    "CachePolicy",
    "KVPages",
    "PageAllocator",
    "Phases",
    "delayed_rows",
    "kept_rows",
    "reserved_rows",
]
