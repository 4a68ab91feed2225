"""Measures memory of logits and of keys and values: `python -m benchmarks.memory`.

Logits: peak memory while choosing tokens for 32 requests × 128 masked positions over LLaDA's
126,464 words, with the engine's tiled head and with the whole tensor. torch counts tensor memory,
since resident memory varies from run to run. Keys and values: the reservation of a request under
each cache policy, for LLaDA-8B's shape, from the engine's own admission.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dllm_engine.memory.cache_policy import CachePolicy, reserved_rows
from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.ops.head import Head
from dllm_engine.sampling.candidates import sample_candidates
from dllm_engine.sampling.rows import RowSampling, SamplingFlags, SpecialTokens
from dllm_engine.sampling_params import CACHE_POLICIES

from benchmarks.allocations import AllocationMeter
from benchmarks.common import RESULTS, write_json

VOCABULARY, HIDDEN = 126_464, 256
REQUESTS, POSITIONS = 32, 128
MASK, EOS = 126_336, 126_081
#: LLaDA-8B: layers, KV heads, head width; bytes of a bfloat16.
LAYERS, KV_HEADS, HEAD_DIM, ELEMENT = 32, 32, 128, 2
PAGE_SIZE = 32
PROMPT_LENGTH, GEN_LENGTH, BLOCK_LENGTH = 896, 128, 32


def _sampling(rows: int, temperature: float) -> RowSampling:
    def column(value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype)

    return RowSampling(
        temperature=column(temperature, torch.float64),
        seed=column(1),
        step=column(0),
        position=torch.arange(rows),
        top_p=column(1.0, torch.float64),
        top_k=column(0),
        dream_statistics=column(0, torch.bool),
        logits_eos_inf=column(0, torch.bool),
        confidence_eos_eot_inf=column(0, torch.bool),
        flags=SamplingFlags(
            noisy=temperature > 0,
            top_p=False,
            top_k=0,
            logits_eos_inf=False,
            confidence_eos_eot_inf=False,
        ),
        num_full_logits=0,
    )


@torch.inference_mode()
def logits_peaks(budget_mb: int) -> dict[str, Any]:
    """Peaks in bytes of both ways, and whether they chose the same tokens."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    hidden = torch.randn(REQUESTS * POSITIONS, HIDDEN, generator=generator)
    head = Head(weight)
    special = SpecialTokens(MASK, torch.tensor([EOS]), torch.tensor([EOS]))
    peaks = {}
    for name, temperature, needs_entropy in (
        ("greedy", 0.0, False),
        ("greedy, with entropy and margin", 0.0, True),
        ("temperature 0.7, with entropy and margin", 0.7, True),
    ):
        rows = _sampling(len(hidden), temperature)
        with AllocationMeter() as meter:
            found = sample_candidates(
                hidden,
                head,
                rows,
                special,
                budget_bytes=budget_mb * 2**20,
                needs_entropy=needs_entropy,
            )
        peaks[name] = meter.peak
        if name == "greedy":
            ours = found
    with AllocationMeter() as meter:
        logits = F.linear(hidden, weight)
        whole = logits.numel() * logits.element_size()
        confidence = logits.softmax(dim=-1)
        logits[:, MASK] = -torch.inf
        token = logits.argmax(dim=-1)
        confidence = confidence.gather(1, token.unsqueeze(1)).squeeze(1)
    same = float((ours.token == token).float().mean())
    torch.testing.assert_close(ours.confidence, confidence, rtol=1e-4, atol=1e-7)
    return {
        "requests": REQUESTS,
        "positions": POSITIONS,
        "vocabulary": VOCABULARY,
        "budget_mb": budget_mb,
        "whole_tensor_bytes": whole,
        "materialised_peak_bytes": meter.peak,
        "engine_peak_bytes": peaks,
        "share_of_whole_tensor": {name: peak / whole for name, peak in peaks.items()},
        "same_tokens": same,
    }


def cache_bytes(ratios: tuple[float, ...]) -> dict[str, int]:
    """Bytes of keys and values that one request of LLaDA-8B's shape reserves, by policy."""
    allocator = PageAllocator(0, PAGE_SIZE)
    page = PAGE_SIZE * 2 * LAYERS * KV_HEADS * HEAD_DIM * ELEMENT
    length = PROMPT_LENGTH + GEN_LENGTH
    found = {}
    for policy in CACHE_POLICIES:
        for ratio in ratios if policy == "sparse" else (1.0,):
            rows = reserved_rows(CachePolicy[policy.upper()], length, BLOCK_LENGTH, ratio)
            name = f"{policy}, ratio {ratio}" if policy == "sparse" else policy
            found[name] = allocator.pages_for(rows) * page
    return found


def plot(result: dict[str, Any]) -> Path:
    """Plot both as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    logits = result["logits"]
    bars = {"materialised": logits["materialised_peak_bytes"]} | logits["engine_peak_bytes"]
    left.barh(list(bars), [size / 2**20 for size in bars.values()])
    left.set_xscale("log")
    left.set_xlabel("peak in MiB")
    left.set_title(f"logits of {REQUESTS} × {POSITIONS} positions, {VOCABULARY:,} words")
    caches = result["cache_bytes_per_request"]
    right.barh(list(caches), [size / 2**20 for size in caches.values()])
    right.set_xlabel("MiB per request")
    right.set_title(f"keys and values, LLaDA-8B, {PROMPT_LENGTH} + {GEN_LENGTH} tokens, bfloat16")
    figure.tight_layout()
    path = RESULTS / "memory.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-mb", type=int, default=64)
    options = parser.parse_args()
    result = {
        "logits": logits_peaks(options.budget_mb),
        "cache_bytes_per_request": cache_bytes((0.25, 0.5, 0.75)),
    }
    whole = result["logits"]["whole_tensor_bytes"]
    print(f"whole tensor {whole / 2**20:.0f} MiB")
    print(f"materialised: peak {result['logits']['materialised_peak_bytes'] / 2**20:.0f} MiB")
    for name, peak in result["logits"]["engine_peak_bytes"].items():
        print(f"engine, {name}: peak {peak / 2**20:.0f} MiB, 1/{whole / max(1, peak):.0f}")
    for name, size in result["cache_bytes_per_request"].items():
        print(f"keys and values, {name}: {size / 2**20:.0f} MiB per request")
    print(write_json("memory", result), plot(result))


if __name__ == "__main__":
    main()
