"""Plans memory once at start: weights, requests, a step, logits; the rest becomes pages.

No admitted request can run out of memory later.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
from pathlib import Path

import torch

from dllm_engine.errors import InvalidConfig
from dllm_engine.models.base import ModelSpec

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use. `str()` is the table that is logged at start."""

    device: str
    #: Memory of the device (of a CPU: free at start, or its container's limit).
    available: int
    #: How much of it the engine may use.
    limit: int
    weights: int
    #: Canvases of running requests and their denoising state.
    requests: int
    #: Peak of a step at the full token budget, without logits.
    activations: int
    logits: int
    #: Recorded forward passes (CUDA graphs).
    graphs: int
    #: A page of `page_size` tokens.
    page: int
    page_size: int
    num_pages: int = 0

    @property
    def pages(self) -> int:
        """Bytes of all pages."""
        return self.page * self.num_pages

    def __str__(self) -> str:
        rows = [
            ("limit", self.limit, f"of {_gib(self.available)} on {self.device}"),
            ("weights", self.weights, ""),
            ("requests", self.requests, "canvases of DLLM_MAX_NUM_SEQS requests"),
            ("activations", self.activations, "peak of a step at the full token budget"),
            ("logits", self.logits, "DLLM_LOGITS_BUDGET_MB"),
            ("graphs", self.graphs, "DLLM_CUDA_GRAPH_ROWS"),
            ("keys and values", self.pages, f"{self.num_pages} pages of {self.page_size} tokens"),
        ]
        return "\n".join(
            f"{name:<16}{_gib(size):>12}  {note}".rstrip()
            for name, size, note in rows
            if size or name != "graphs"
        )

    def with_pages(self, longest: int, max_num_seqs: int, *, needs_pages: bool) -> MemoryPlan:
        """Divide what is left of the limit into pages, up to the most that can be used.

        Args:
            longest: tokens of the longest sequence.
            needs_pages: whether the server's default cache policy stores anything.

        Raises:
            InvalidConfig: the model does not fit; names the settings to change.
        """
        used = self.weights + self.requests + self.activations + self.logits + self.graphs
        left = self.limit - used
        sequence = -(-longest // self.page_size)
        useful = max_num_seqs * 2 * sequence  # guidance doubles a request
        num_pages = max(0, min(useful, left // self.page))
        least = sequence if needs_pages else 0
        if left < 0 or num_pages < least:
            missing = least * self.page - left
            raise InvalidConfig(
                f"DLLM_MEMORY_LIMIT: the model does not fit into {_gib(self.limit)} of "
                f"{self.device}: weights {_gib(self.weights)}, requests {_gib(self.requests)}, "
                f"activations {_gib(self.activations)}, logits {_gib(self.logits)}, graphs "
                f"{_gib(self.graphs)}, keys and values of one sequence {_gib(least * self.page)}; "
                f"{_gib(missing)} too much. Raise DLLM_MEMORY_LIMIT, or lower DLLM_MAX_NUM_SEQS "
                "(requests), DLLM_MAX_GEN_LENGTH (their credit), DLLM_MAX_NUM_BATCHED_TOKENS "
                "(activations), DLLM_LOGITS_BUDGET_MB, DLLM_CUDA_GRAPH_ROWS or DLLM_MAX_MODEL_LEN "
                "(all but weights and logits)"
            )
        return dataclasses.replace(self, num_pages=num_pages)


def check_weights(weights: int, limit: int) -> None:
    """Check the bytes of the weights before they are loaded.

    Raises:
        InvalidConfig: the weights alone do not fit.
    """
    if weights > limit:
        raise InvalidConfig(
            f"DLLM_MEMORY_LIMIT: the weights alone take {_gib(weights)}, the limit is "
            f"{_gib(limit)}; raise it, or set DLLM_DTYPE to a smaller type, or DLLM_QUANTIZATION"
        )


def page_bytes(spec: ModelSpec, page_size: int, element_size: int) -> int:
    """Count the bytes of one page of keys and values over all layers of one rank."""
    num_kv_heads = spec.num_kv_heads // spec.num_ranks
    per_token = 2 * spec.num_layers * num_kv_heads * spec.head_dim * element_size
    return page_size * per_token


def parse_limit(text: str, available: int) -> int:
    """Parse `DLLM_MEMORY_LIMIT` into bytes, given `available` bytes.

    Raises:
        InvalidConfig: it is neither a size nor a fraction.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not found:
        raise InvalidConfig(
            f"DLLM_MEMORY_LIMIT: must be a size such as 6GiB or a fraction such as 0.9; got {text}"
        )
    number, unit = float(found[1]), found[2]
    if not unit and number <= 1:
        return int(number * available)
    return int(number * _UNITS[unit])


def available_bytes(device: str) -> int:
    """Return the free memory of `device`, at most the container's limit."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return free
    meminfo = Path("/proc/meminfo").read_text()
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    assert found
    free = int(found[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


class PeakMeter:
    """Measures by how much memory use peaks inside a `with` block."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = 0
        #: Bytes; set when the block ends.
        self.peak = 0

    def __enter__(self) -> PeakMeter:
        if self._device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            _return_freed_memory()
            # Linux: makes the high-water mark start again from what is used now.
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.startswith("cuda"):
            top = torch.cuda.max_memory_allocated(self._device)
        else:
            top = _status_bytes("VmHWM")
        self.peak = max(0, top - self._before)


def _return_freed_memory() -> None:
    """Return freed memory to the system; otherwise reusing it would raise no peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other libraries do not
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _gib(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 2**10:.1f} KiB"
