"""Compiled variants do not depend on the batch, so no request waits for a compilation."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dllm_engine import LLM, SamplingParams
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.support.checkpoints import write_llada
from tests.support.compile_kernels import Variant
from tests.unit.kernels.cases import DEVICE, SMALL

#: Of every kind that has kernels of its own, or sizes.
KINDS = [
    SamplingParams(gen_length=3, cache="dual", remasking="entropy"),
    SamplingParams(gen_length=4, block_length=2, cache="sparse", temperature=0.5, seed=1),
    SamplingParams(gen_length=3, cache="delayed", confidence_threshold=0.5, credit=True),
    SamplingParams(gen_length=3, cache="prefix", cfg_scale=0.5, logits_eos_inf=True),
    SamplingParams(gen_length=3, alg="topk_margin", temperature=0.5, seed=2),
    SamplingParams(gen_length=3, alg="entropy", temperature=0.2, top_p=0.95, seed=3),
    SamplingParams(gen_length=3, temperature=0.5, top_k=3, confidence_eos_eot_inf=True, seed=4),
]


@functools.cache
def compiled(kernel: Any) -> JITFunction[Any]:
    """Stands for the compilation of a kernel that the interpreter runs."""
    if isinstance(kernel, JITFunction):
        return kernel
    names = ("do_not_specialize", "do_not_specialize_on_alignment")
    return JITFunction(kernel.fn, **{name: kernel.kwargs[name] for name in names})


@contextmanager
def variants() -> Iterator[set[str]]:
    """Collects the variants of all launches."""
    kind = InterpretedFunction if DEVICE == "cpu" else JITFunction
    run = kind.run
    seen: set[str] = set()

    def noting(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        seen.add(Variant.of(compiled(kernel), 90, args, options).key)
        return run(kernel, *args, grid=grid, warmup=warmup, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "run", noting)
        yield seen


@pytest.mark.slow
def test_all_variants_are_compiled_at_start(tmp_path: Path) -> None:
    """All variants are compiled at start, whatever requests, lengths and batch sizes follow."""
    checkpoint = write_llada(tmp_path)
    with variants() as seen:
        options = {"device": DEVICE, "dtype": "float32", "kv_page_size": 4, **SMALL}
        llm = LLM(checkpoint, kernels="triton", **options)
        at_start = set(seen)
        assert at_start
        for count in (1, 3, 8):
            kinds = [KINDS[i % len(KINDS)] for i in range(count)]
            prompts = [[5] * (1 + count + 3 * (i % 5)) for i in range(count)]
            llm.generate(prompts, kinds, progress=False)
    assert seen - at_start == set()
