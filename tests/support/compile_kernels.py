"""Compiles every kernel for a card, on a machine without one.

`python -m tests.support.compile_kernels 90`.

The kernels' own wrappers are called with tensors of real sizes; each launch is compiled down to
machine code for the given card instead of being run. Prints the kernels, one a line.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from dllm_engine.ops import Choice, FlatLayout, Head, LayerPages
from dllm_engine.ops.kernels.attention import packed_attention
from dllm_engine.ops.kernels.linear import invariant_linear
from dllm_engine.ops.kernels.norm import apply_rotary, rms_norm
from dllm_engine.ops.layout import FlatSelection
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


def compile_launch(kernel: JITFunction[Any], capability: int, *args: Any, **options: Any) -> None:
    """Compile `kernel` for the arguments of one launch, as a launch would."""
    signature, constants, attributes = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr or isinstance(value, bool):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    names = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=names)
    assert len(compiled.asm["cubin"]) > 0
    sys.stdout.write(f"{kernel.fn.__name__}\n")


def launch_all(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    """Launch what a step of a model of these sizes launches."""
    head_dim, rows, sequences = 128, 96, 3
    qkv = torch.zeros(rows, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
    pages = LayerPages(*torch.zeros(2, 40, 32, num_kv_heads, head_dim, dtype=dtype))
    shared = 1 << (num_heads // num_kv_heads - 1).bit_length()
    layout = FlatLayout.of([32] * sequences, 64 // shared, "cpu")
    some = torch.ones(sequences, dtype=torch.int64)
    whole = FlatLayout(
        **{
            **vars(layout),
            "write_places": torch.zeros(rows, dtype=torch.int64),
            "selection": FlatSelection(some, some, some, some, some, 1024),
        }
    )
    packed_attention(q, k, v, whole, pages)
    angles = torch.zeros(rows, 1, head_dim)
    apply_rotary(q, angles, angles)
    x = torch.zeros(rows, num_heads * head_dim, dtype=dtype)
    rms_norm(x, x[0], 1e-5)
    weight = torch.zeros(1024, num_heads * head_dim, dtype=dtype)
    invariant_linear(x, weight)
    invariant_linear(x, weight, weight[:, 0].contiguous())
    launch_head(x, weight)


def launch_head(hidden: Tensor, weight: Tensor) -> None:
    """Every form of the head: greedy or with noise, with entropies or without, with credit."""
    head = Head(weight, kernels=True)
    ids = torch.zeros(2, dtype=torch.int64)
    keys = torch.zeros(len(hidden), dtype=torch.int64)
    heat = torch.zeros(len(hidden), dtype=torch.float64)
    forbids = torch.zeros(len(hidden), dtype=torch.bool)
    for noisy in (False, True):
        for spread in (False, True):
            noise = (heat, keys) if noisy else (None, None)
            choice = Choice(1, ids, ids, forbids, forbids, *noise, spread=spread)
            head.statistics(hidden, choice, torch.zeros(len(hidden), 16, dtype=torch.int64))


def main(capability: int) -> None:
    """Compile for a card: 80 is an A100, 90 an H100."""

    def run(kernel: JITFunction[Any], *args: Any, **options: Any) -> None:
        names = {parameter.name for parameter in kernel.params}
        assert not names & set(options), "kernels are launched with arguments by place"
        compile_launch(kernel, capability, *args, **options)

    JITFunction.run = run  # type: ignore[method-assign]
    launch_all(torch.bfloat16, 32, 32)
    launch_all(torch.bfloat16, 28, 4)
    launch_all(torch.float32, 8, 8)


if __name__ == "__main__":
    main(int(sys.argv[1]))
