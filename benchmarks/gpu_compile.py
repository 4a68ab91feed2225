"""Measures `torch.compile` on the parts of a layer, beside torch's operations and our kernels.

Parts are compiled for any number of rows (`dynamic=True`), since steps vary. On a CPU, where
inductor needs a C++ compiler, only torch's operations are compared: our kernels run in an
interpreter there, whose times mean nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from dllm_engine.ops.dispatch import TORCH, Operations, choose_operations
from torch import Tensor

from benchmarks.gpu_timing import Timer, host_seconds

#: Rows and hidden size of each measurement.
HOST_SIZES = ((16, 128), (1024, 512))
CARD_SIZES = ((16, 4096), (1024, 4096))
_HEADS = 8
#: Inner size of the MLP over the hidden size, as LLaDA-8B has it.
_INNER = 3
_EPS = 1e-5


def _parts(
    operations: Operations, rows: int, width: int, device: str, dtype: torch.dtype
) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Parts by name: a function of the operations, and its inputs (the same each time)."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.empty(shape, device=device).normal_(std=scale, generator=generator)
        return made.to(dtype)

    inner = _INNER * width
    x, gain = normal(rows, width), normal(width)
    heads = normal(rows, _HEADS, width // _HEADS)
    angles = normal(rows, 1, width // _HEADS)
    gate_up = normal(2 * inner, width, scale=width**-0.5)
    down = normal(width, inner, scale=inner**-0.5)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return operations.rms_norm(x, gain, _EPS)

    def mlp(x: Tensor, gain: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gated = operations.silu_mul(F.linear(norm(x, gain), gate_up))
        return operations.add_linear(x, gated, down)

    return {
        "norm": (norm, (x, gain)),
        "silu · up": (operations.silu_mul, (normal(rows, 2 * inner),)),
        "rotary": (operations.apply_rotary, (heads, angles, angles)),
        "MLP": (mlp, (x, gain, gate_up, down)),
    }


@torch.inference_mode()
def measure_compiled(
    device: str,
    sizes: Sequence[tuple[int, int]],
    done: Callable[[list[dict[str, Any]]], bool],
    *,
    backend: str = "inductor",
) -> None:
    """Time every part at every size; `done` gets the results so far and returns whether to go on.

    A failure puts its error in place of the time.

    Args:
        device: "cpu" (float32) or "cuda" (bfloat16).
        sizes: rows and hidden size of each.
        backend: the backend of `torch.compile`.
    """
    on_gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    seconds = Timer(device).seconds if on_gpu else host_seconds
    found: list[dict[str, Any]] = []
    for rows, width in sizes:
        plain = _parts(TORCH, rows, width, device, dtype)
        ours = choose_operations("triton", device, dtype) if on_gpu else None
        kernels = plain if ours is None else _parts(ours, rows, width, device, dtype)
        for name, (work, inputs) in plain.items():
            row: dict[str, Any] = {"part": name, "rows": rows, "width": width}
            row |= {"seconds": {}, "errors": {}}
            for how in ("torch", "compiled") if ours is None else ("torch", "compiled", "kernels"):
                try:
                    run = kernels[name][0] if how == "kernels" else work
                    if how == "compiled":
                        run = torch.compile(work, dynamic=True, backend=backend)
                    row["seconds"][how] = seconds(functools.partial(run, *inputs))
                except Exception as error:  # noqa: BLE001  measure the others anyway
                    row["errors"][how] = f"{type(error).__name__}: {error}"[:300]
            found.append(row)
            if not done(found):
                return
