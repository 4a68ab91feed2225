"""Compiles every kernel for a card, on a machine without one.

`python -m tests.support.compile_kernels 90`.

It calls the kernels' own wrappers with tensors of real sizes. Each launch is compiled to machine
code for the given card, as a launch there would be, instead of running. Prints the resources of
each compilation, one `Compiled` in JSON per line.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from dllm_engine.ops.dispatch import choose_operations
from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import Filters, HeadOptions
from dllm_engine.ops.kernels.attention import packed_attention
from dllm_engine.ops.kernels.linear import invariant_linear
from dllm_engine.ops.kernels.norm import apply_rotary, rms_norm, silu_mul
from dllm_engine.ops.layout import FlatLayout, FlatSelection, LayerPages
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
_DOUBLE = r"\b(?:add|sub|mul|fma|div|neg)\.(?:\w+\.)?f64\b"
#: Computes a launch's variant, by the kernel's function; slow to make.
_BINDERS: dict[Any, Callable[..., Any]] = {}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compilation of a kernel."""

    kernel: str
    #: Type of the first tensor.
    dtype: str
    #: Per thread: registers, and bytes of stack for spilled registers.
    registers: int
    stack: int
    #: Bytes of shared memory of a program.
    shared: int
    #: Loads that start ahead of their use.
    async_copies: int
    #: Instructions of arithmetic in double precision.
    double_arithmetic: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant that Triton compiles separately: types, constants, properties of numbers."""

    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @classmethod
    def of(
        cls, kernel: JITFunction[Any], capability: int, args: tuple[Any, ...], options: Any
    ) -> Variant:
        """The variant of a launch, computed like `JITFunction.run`."""
        backend = CUDABackend(GPUTarget("cuda", capability, 32))
        if kernel.fn not in _BINDERS:
            _BINDERS[kernel.fn] = create_function_from_signature(
                kernel.signature, kernel.params, backend
            )
        bound, specialization, named = _BINDERS[kernel.fn](*args, **options)
        _, signature, constants, attributes = kernel._pack_args(
            backend, dict(named), bound, specialization, named
        )
        return cls(kernel, signature, constants, attributes, named)

    @property
    def key(self) -> str:
        """Key that is equal for launches that share a compilation."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return f"{self.kernel.fn.__name__} {parts}"

    def compile(self, capability: int) -> Compiled:
        """Compile to machine code."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options=self.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            command = [_BINARIES / "cuobjdump", "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        taken = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert taken is not None, usage
        return Compiled(
            kernel=self.kernel.fn.__name__,
            dtype=next(iter(self.signature.values())).removeprefix("*"),
            registers=int(taken[1]),
            stack=int(taken[2]),
            shared=made.metadata.shared,
            async_copies=made.asm["ttgir"].count("async_copy_global_to_local"),
            double_arithmetic=len(re.findall(_DOUBLE, made.asm["ptx"])),
        )


def instead_of_running(capability: int, seen: Callable[[Variant], None]) -> None:
    """Replace kernel launches by recording their variants."""

    def run(kernel: JITFunction[Any], *args: Any, **options: Any) -> None:
        for name in ("grid", "warmup"):
            options.pop(name, None)
        seen(Variant.of(kernel, capability, args, options))

    JITFunction.run = run  # type: ignore[method-assign]


def launch_all(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    """Launch the kernels of a step of a model of these sizes, except the head."""
    head_dim = 128
    rows, sequences, longest = 96, 3, 4096
    qkv = torch.zeros(rows, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
    pages = LayerPages(*torch.zeros(2, 40, 32, num_kv_heads, head_dim, dtype=dtype))
    block_m = choose_operations("triton", "cuda", dtype).block_m(num_heads, num_kv_heads)
    assert block_m is not None
    layout = FlatLayout.of([rows // sequences] * sequences, block_m, "cpu")
    packed_attention(q, k, v, layout)
    some = torch.ones(sequences, dtype=torch.int64)
    whole = dataclasses.replace(
        layout,
        block_tables=torch.zeros(sequences, -(-longest // 32), dtype=torch.int64),
        slot_mapping=torch.zeros(rows, dtype=torch.int64),
        selection=FlatSelection(some, some, some, some, some, longest),
    )
    packed_attention(q, k, v, whole, pages)
    limited = dataclasses.replace(
        whole, selection=None, key_limits=torch.ones(rows, dtype=torch.int64)
    )
    packed_attention(q, k, v, limited, pages)
    angles = torch.zeros(rows, 1, head_dim)
    apply_rotary(q, angles, angles)
    x = torch.zeros(rows, num_heads * head_dim, dtype=dtype)
    rms_norm(x, x[0], 1e-5)
    silu_mul(torch.zeros(rows, 2 * 12288, dtype=dtype))
    weight = torch.zeros(1024, num_heads * head_dim, dtype=dtype)
    invariant_linear(x, weight)
    invariant_linear(x, weight, weight[:, 0].contiguous())


def launch_head(dtype: torch.dtype, width: int, *, noise: bool) -> None:
    """Launch forms of the head: with and without entropies, with credit, greedy, with noise."""
    hidden, weight = torch.zeros(96, width, dtype=dtype), torch.zeros(1024, width, dtype=dtype)
    head = Head(weight, choose_operations("triton", "cuda", dtype))
    ids = torch.zeros(2, dtype=torch.int64)
    keys = torch.zeros(len(hidden), dtype=torch.int64)
    heat = torch.zeros(len(hidden))
    forbids = torch.zeros(len(hidden), dtype=torch.bool)
    for noisy in (False, True)[: 1 + noise]:
        for needs_entropy in (False, True):
            random = (heat, keys) if noisy else (None, None)
            options = HeadOptions(
                1, ids, ids, forbids, forbids, *random, needs_entropy=needs_entropy
            )
            head.statistics(hidden, options, torch.zeros(len(hidden), 16, dtype=torch.int64))
    filters = Filters(heat.double(), keys, forbids, uses_top_p=True, most_top_k=1)
    head.draw(torch.zeros(96, 126464, dtype=dtype), options, filters)


def main(capability: int) -> None:
    """Compile for a card: 80 is an A100, 89 an L40, 90 an H100.

    Noise takes a third of the time, and float16 differs from bfloat16 only in a name: compile them
    once. float32 needs the most shared memory: what fits an L40 fits an A100.
    """
    all_of_them = capability == 90
    dtypes = {
        80: [torch.bfloat16],
        89: [torch.bfloat16, torch.float32],
        90: [torch.bfloat16, torch.float32, torch.float16],
    }[capability]
    done: set[str] = set()

    def compile_once(variant: Variant) -> None:
        if variant.key not in done:
            done.add(variant.key)
            found = variant.compile(capability)
            sys.stdout.write(json.dumps(dataclasses.asdict(found)) + "\n")

    instead_of_running(capability, compile_once)
    for dtype in dtypes:
        launch_all(dtype, 32, 32)
    launch_all(torch.bfloat16, 28, 4)
    launch_head(torch.bfloat16, 4096, noise=all_of_them)
    if torch.float32 in dtypes:
        launch_head(torch.float32, 4096, noise=False)


if __name__ == "__main__":
    main(int(sys.argv[1]))
