"""Block-wise models decode the same with kernels, graphs and ranks as with torch operations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dllm_engine import LLM, SamplingParams
from dllm_engine.execution import rank_model

from tests.support.family_checkpoints import write_family
from tests.unit.kernels.cases import DEVICE, SMALL

#: Prompts of several chunks, and of less than a block.
LENGTHS = [37, 3]
PROMPTS = [list(range(7 * i + 1, 7 * i + 1 + length)) for i, length in enumerate(LENGTHS)]
MIXTURE = [
    SamplingParams(gen_length=6, block_length=4, confidence_threshold=0.05),
    SamplingParams(gen_length=5, block_length=4, temperature=0.8, seed=1),
]
OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_page_size": 8, "max_num_seqs": 4, **SMALL}


def assert_same(found: LLM, wanted: LLM) -> None:
    """Both give the mixture the same tokens, and confidences within float32's rounding."""
    for mine, theirs in zip(
        found.generate(PROMPTS, MIXTURE, progress=False),
        wanted.generate(PROMPTS, MIXTURE, progress=False),
        strict=True,
    ):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        np.testing.assert_allclose(mine.confidence, theirs.confidence, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_kernels_and_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels keep to the limits of each row, in a recorded pass too."""
    checkpoint = write_family(tmp_path, "sdar")

    def run_again(work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work

    options = dict(OPTIONS)
    if DEVICE == "cpu":
        monkeypatch.setattr(rank_model, "largest_graph", lambda *_: 32)
        monkeypatch.setattr(rank_model, "cuda_recorder", lambda: run_again)
    else:
        options["cuda_graph_rows"] = 32
    found = LLM(checkpoint, kernels="triton", device=DEVICE, **options)
    assert_same(found, LLM(checkpoint, kernels="torch", device=DEVICE, **OPTIONS))


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """A block-wise model over two ranks gives the tokens of one."""
    checkpoint = write_family(tmp_path, "nemotron")
    options = OPTIONS | {"dtype": "float64", "device": "cpu"}
    with LLM(checkpoint, tensor_parallel_size=2, **options) as found:
        assert_same(found, LLM(checkpoint, **options))
