"""Readings: log-probabilities of given tokens at masks, after one forward, in any batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dllm_engine import LLM, InvalidRequest, Prompt, SamplingParams
from dllm_engine.request import CanvasUpdate

from tests.support.checkpoints import MASK, write_dream, write_llada
from tests.support.family_checkpoints import mask_of, write_family
from tests.support.native import block_causal, both_ways, causal_before, native
from tests.support.oracle import dream_oracle, llada_oracle

CONTEXT = [3, 5, 8, 13, 21, 34]
#: Tokens of other requests' prompts, which decode in the same steps.
BUSY = SamplingParams(gen_length=8, block_length=8, steps=8, temperature=0.7, top_k=20, seed=3)
BLOCK = {"sdar": 4, "fast_dllm": 32, "nemotron": 8}


def read_all(llm: LLM, prompts: list[Prompt], *, busy: int = 0) -> list[np.ndarray[Any, Any]]:
    """What each prompt reads, with `busy` other requests in the same steps."""
    engine = llm.engine
    for i in range(busy):
        engine.add(engine.make_request(Prompt([1 + i, 2, 3]), BUSY))
    requests = [engine.make_request(prompt, SamplingParams()) for prompt in prompts]
    for request in requests:
        engine.add(request)
    found: dict[int, CanvasUpdate] = {}
    while engine.has_work:
        found |= {update.request_id: update for update in engine.step() if update.finished}
    reads = [found[request.request_id].read for request in requests]
    return [read for read in reads if read is not None]


@pytest.fixture(scope="module", params=["llada", "dream", "illada"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LLM, Callable[[torch.Tensor], torch.Tensor], int]:
    """An engine in float64, a plain forward of the same weights, and the mask."""
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    if family == "llada":
        write_llada(folder)
        forward, mask = llada_oracle(folder, torch.float64), MASK
    elif family == "dream":
        write_dream(folder)
        forward = dream_oracle(folder, torch.float64)
        mask = LLM(folder).engine.spec.mask_token_id
    else:
        write_family(folder, family)
        forward, mask = both_ways(native(folder, torch.float64)), mask_of(family)
    llm = LLM(folder, dtype="float64", max_num_batched_tokens=256, max_num_seqs=6)
    return llm, forward, mask


def test_reads_equal_a_plain_forward(
    whole: tuple[LLM, Callable[[torch.Tensor], torch.Tensor], int],
) -> None:
    """Masks anywhere in a canvas read the raw log-softmax, in any mix; in all, bit for bit."""
    llm, forward, mask = whole
    canvas = [7, mask, 9, mask, mask]
    reads = np.array([[4, 11, -1], [6, -1, -1], [4, 5, 6]])
    prompts = [
        Prompt(CONTEXT, canvas_ids=canvas, reads=reads),
        Prompt(CONTEXT[:3], canvas_ids=[mask], reads=np.array([[9]])),
        Prompt(CONTEXT, canvas_ids=canvas, suffix_ids=[2, 4], reads=reads),
    ]
    found = read_all(llm, prompts, busy=3)
    for prompt, read in zip(prompts, found, strict=True):
        tokens = torch.tensor([*prompt.ids, *prompt.canvas_ids, *prompt.suffix_ids])
        logs = forward(tokens).log_softmax(dim=-1)
        places = [len(prompt.ids) + i for i, t in enumerate(prompt.canvas_ids) if t == mask]
        assert prompt.reads is not None
        for row, place in enumerate(places):
            for column, token in enumerate(prompt.reads[row]):
                expected = -math.inf if token < 0 else logs[place, token].item()
                assert read[row, column] == pytest.approx(expected, abs=1e-5)
    alone = [read_all(llm, [prompt])[0] for prompt in prompts]
    assert all(np.array_equal(a, b) for a, b in zip(alone, found, strict=True))


@pytest.mark.parametrize("family", list(BLOCK))
def test_block_wise_models_read_behind_the_prompt(family: str, tmp_path: Path) -> None:
    """The first mask reads what a plain forward over prompt and block gives, after any prefill."""
    write_family(tmp_path, family)
    forward, mask, size = native(tmp_path, torch.float64), mask_of(family), BLOCK[family]
    llm = LLM(tmp_path, dtype="float64", max_num_batched_tokens=256, max_num_seqs=6)
    long = [int(x) for x in np.random.default_rng(0).integers(3, 200, 75)]
    prompts = [
        Prompt(ids, canvas_ids=[mask], reads=np.array([[4, 6, 9]]))
        for ids in (CONTEXT[:4], CONTEXT[:5], long[:64], long, long[:70])
    ]
    busy = [Prompt([9, 8, 7])]
    for prompt in busy:
        params = SamplingParams(gen_length=8, steps=8)
        llm.engine.add(llm.engine.make_request(prompt, params))
    found = read_all(llm, prompts)
    for prompt, read in zip(prompts, found, strict=True):
        expected = _first_mask(forward, family, prompt.ids, mask, size)
        assert read[0] == pytest.approx(expected[[4, 6, 9]].numpy(), abs=1e-5)


def _first_mask(forward: Any, family: str, ids: list[int], mask: int, size: int) -> torch.Tensor:
    """Log-softmax at the first position behind `ids`, by a plain forward."""
    length = len(ids)
    if family == "nemotron":
        logits = forward(torch.tensor(ids), causal_before(length, length))
        return logits[-1].log_softmax(dim=-1)
    if family == "fast_dllm" and length % size == 0:
        logits = forward(torch.tensor(ids), block_causal(length, size))
        return logits[-1].log_softmax(dim=-1)
    tokens = ids + [mask] * (-length % size or size)
    logits = forward(torch.tensor(tokens), block_causal(len(tokens), size))
    return logits[length - (family == "fast_dllm")].log_softmax(dim=-1)


def test_a_reading_costs_one_pass_and_decodes_nothing(llm64: LLM) -> None:
    """It ends in its first step, beside requests that go on, and counts no token."""
    engine = llm64.engine
    before = engine.stats.forward_passes
    request = engine.make_request(
        Prompt(CONTEXT, canvas_ids=[MASK, MASK], reads=np.array([[1], [2]])), SamplingParams()
    )
    engine.add(request)
    (update,) = engine.step()
    assert update.finished
    assert update.usage.completion_tokens == 0
    assert update.token_ids.tolist() == [MASK, MASK]
    assert engine.stats.forward_passes - before == 1


@pytest.mark.parametrize(
    ("canvas", "reads", "field"),
    [
        ([MASK, 4], [[1], [2]], "reads"),
        ([MASK], [[10**6]], "reads"),
        ([MASK], [[-2]], "reads"),
    ],
)
def test_unusable_reads_are_refused(
    llm: LLM, canvas: list[int], reads: list[list[int]], field: str
) -> None:
    """Tokens that do not exist, and a number of rows that is not that of the masks."""
    with pytest.raises(InvalidRequest, match=field):
        llm.engine.make_request(
            Prompt(CONTEXT, canvas_ids=canvas, reads=np.array(reads)), SamplingParams()
        )
