"""The engine decodes the same with kernels as with torch operations."""

from pathlib import Path

import numpy as np
import pytest
from dllm_engine import LLM, SamplingParams

from tests.support.checkpoints import write_dream, write_llada
from tests.unit.kernels.cases import DEVICE, SMALL

#: Every policy, with guidance, delays, thresholds, filters and noise among them; short blocks.
MIXTURE = [
    SamplingParams(gen_length=5, block_length=3, cache="none", cfg_scale=1.5),
    SamplingParams(gen_length=5, block_length=3, cache="prefix", temperature=0.8, seed=1),
    SamplingParams(gen_length=5, block_length=3, cache="dual", refresh_interval=2),
    SamplingParams(
        gen_length=6, block_length=3, cache="sparse", retention_ratio=0.4, pool_kernel=3
    ),
    SamplingParams(
        gen_length=4, block_length=2, cache="sparse", retention_ratio=0.7, cfg_scale=0.5,
        delay_steps=1,
    ),
    SamplingParams(gen_length=5, block_length=3, cache="delayed", confidence_threshold=0.01),
    SamplingParams(gen_length=4, cache="delayed", remasking="entropy"),
    SamplingParams(gen_length=4, alg="topk_margin", temperature=0.5, top_p=0.9, seed=2),
]  # fmt: skip
#: Long where `sparse` is to choose: of short ones it keeps all.
LENGTHS = [3, 6, 9, 36, 36, 18, 21, 24]
PROMPTS = [list(range(7 * i, 7 * i + length)) for i, length in enumerate(LENGTHS)]


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_llada, write_dream])
def test_same_tokens(write: object, tmp_path: Path) -> None:
    """A batch with all policies gives the same tokens, and confidences within float32's
    rounding."""
    assert callable(write)
    checkpoint = write(tmp_path)
    options = {"dtype": "float32", "kv_page_size": 8, "max_num_seqs": 6, **SMALL}
    found = LLM(checkpoint, kernels="triton", device=DEVICE, **options)
    wanted = LLM(checkpoint, kernels="torch", device=DEVICE, **options)
    pairs = zip(
        found.generate(PROMPTS, MIXTURE, progress=False),
        wanted.generate(PROMPTS, MIXTURE, progress=False),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        np.testing.assert_allclose(mine.confidence, theirs.confidence, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_batch_invariance(tmp_path: Path) -> None:
    """With `batch_invariant`, a request has bitwise the same tokens and confidences alone and in a
    batch."""
    llm = LLM(
        write_llada(tmp_path), kernels="triton", device=DEVICE, dtype="float32", kv_page_size=8,
        batch_invariant=True, **SMALL,
    )  # fmt: skip
    together = llm.generate(PROMPTS, MIXTURE, progress=False)
    for i in (1, 3):
        alone = llm.generate([PROMPTS[i]], MIXTURE[i], progress=False)[0]
        assert alone.token_ids.tolist() == together[i].token_ids.tolist()
        assert alone.confidence.tolist() == together[i].confidence.tolist()


@pytest.mark.slow
def test_two_ranks_on_kernels(tmp_path: Path) -> None:
    """A model split over two ranks on kernels decodes the same as on torch operations."""
    checkpoint = write_llada(tmp_path)
    options = {"dtype": "float32", "kv_page_size": 8, "max_num_seqs": 6, "device": "cpu", **SMALL}
    chosen = [0, 1, 3]
    prompts, params = [PROMPTS[i] for i in chosen], [MIXTURE[i] for i in chosen]
    wanted = LLM(checkpoint, kernels="torch", **options).generate(prompts, params, progress=False)
    with LLM(checkpoint, kernels="triton", tensor_parallel_size=2, **options) as llm:
        assert llm.engine.runner.rank.block_m
        found = llm.generate(prompts, params, progress=False)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        np.testing.assert_allclose(mine.confidence, theirs.confidence, rtol=1e-4, atol=1e-6)
