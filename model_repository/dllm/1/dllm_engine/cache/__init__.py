"""Keys and values kept between steps: which (policies) and where (pages)."""

from .pages import KVPages, PageAllocator
from .policy import LEAST_KEPT, CachePolicy, Phases, kept_rows, reserved_rows, unfinished

__all__ = [
    "LEAST_KEPT",
    "CachePolicy",
    "KVPages",
    "PageAllocator",
    "Phases",
    "kept_rows",
    "reserved_rows",
    "unfinished",
]
