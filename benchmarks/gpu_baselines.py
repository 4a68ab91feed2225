"""Baselines on the same card: plain loops, and other systems' checkouts; see `gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import PlainLlama, Work, fast_dllm, reference

PROMPT_LENGTH = 128
#: Requests in a static batch.
STATIC_BATCH = 32


def random_prompts(count: int, length: int, mask_id: int) -> torch.Tensor:
    """Random token ids, well below the special tokens: [count, length]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, mask_id // 2, (count, length), generator=generator)


def measure_baselines(
    checkpoint: Path,
    device: str,
    work: Work,
    left: Callable[[], float],
    done: Callable[[list[dict[str, Any]]], None],
    *,
    prompt_length: int = PROMPT_LENGTH,
    static_batch: int = STATIC_BATCH,
) -> None:
    """Tokens per second of LLaDA's loop and Fast-dLLM's dual cache, in bfloat16."""
    model = PlainLlama(checkpoint, device, torch.bfloat16)
    prompts = random_prompts(static_batch, prompt_length, work.mask_id).to(device)
    rows = []
    for name, generate, count in (
        ("Fast-dLLM dual cache, one by one", fast_dllm, 1),
        ("reference, one by one", reference, 1),
        (f"Fast-dLLM dual cache, static batch of {static_batch}", fast_dllm, static_batch),
        (f"reference, static batch of {static_batch}", reference, static_batch),
    ):
        if left() <= 0:
            return
        short = Work(work.block_length, work.block_length, work.mask_id)
        generate(model, prompts[:count], short)  # sets up libraries
        _wait(device)
        began = time.perf_counter()
        generate(model, prompts[:count], work)
        _wait(device)
        seconds = time.perf_counter() - began
        speed = count * work.gen_length / seconds
        rows.append({"system": name, "tokens_per_second": speed, "latency_seconds": seconds})
        done(rows)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def run_checkout(
    system: str,
    directory: Path,
    checkpoint: Path,
    job: dict[str, Any],
    *,
    python: str,
    limit: float,
) -> dict[str, Any]:
    """Measure a checkout in its own process (`benchmarks.gpu_checkouts`).

    Args:
        system: "fast-dllm" or "dllm-serve".
        directory: the checkout.
        checkpoint: a LLaDA.
        job: the prompts and parameters; see `benchmarks.gpu_checkouts`.
        python: an interpreter with the checkout's requirements.
        limit: seconds.

    Returns:
        The result, or {"error": …}.
    """
    script = Path(__file__).with_name("gpu_checkouts.py")
    command = [python or sys.executable, str(script), system, str(directory), str(checkpoint)]
    try:
        ended = subprocess.run(
            command,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=limit,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit:.0f} s"}
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        return {"error": ended.stderr[-2000:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
