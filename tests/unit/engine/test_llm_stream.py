"""`LLM.stream` and trajectories: which step decoded what, without a server."""

from __future__ import annotations

import numpy as np
import pytest
from dllm_engine import LLM, Completion, DenoisingStep, InvalidRequest, Prompt, SamplingParams

from tests.support.checkpoints import MASK

PROMPT = [1, 2, 3]
PARAMS = SamplingParams(gen_length=12, block_length=4, steps=6, ignore_eos=True)


def watched(
    llm: LLM, prompt: object, params: SamplingParams
) -> tuple[list[DenoisingStep], Completion]:
    *steps, last = llm.stream(prompt, params)
    assert all(isinstance(step, DenoisingStep) for step in steps)
    assert isinstance(last, Completion)
    return steps, last


def test_a_stream_ends_with_what_generate_returns(llm: LLM) -> None:
    """One item per step, then the completion; watching changes no token."""
    steps, last = watched(llm, PROMPT, PARAMS)
    (alone,) = llm.generate(PROMPT, PARAMS, progress=False)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert last.token_ids.tolist() == steps[-1].token_ids.tolist() == alone.token_ids.tolist()
    assert (last.text, last.usage, alone.trajectory) == (alone.text, alone.usage, None)
    assert all(last.text.startswith(step.text) for step in steps)
    for step in steps:
        masked = step.token_ids == MASK
        assert [text is None for text in step.canvas] == masked.tolist()
        assert np.array_equal(step.confidence >= 0, ~masked)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_trajectory_is_what_the_stream_showed(llm: LLM, cache: str) -> None:
    """Each position has the step that committed it, and its confidence; in a batch as alone."""
    params = SamplingParams(gen_length=12, block_length=4, steps=6, ignore_eos=True, cache=cache)
    steps, last = watched(llm, PROMPT, params)
    seen = np.full(12, -1)
    for step in steps:
        seen[step.committed] = step.step
    assert last.trajectory is not None
    assert last.trajectory.steps.tolist() == seen.tolist()
    assert sorted(seen.tolist()) == [s for s in range(1, 7) for _ in range(2)]
    assert last.trajectory.confidence.tolist() == last.confidence.tolist()
    whole_characters = last.text.replace("\N{REPLACEMENT CHARACTER}", "")
    assert "".join(last.trajectory.pieces) == whole_characters
    batch = llm.generate([PROMPT, [5], PROMPT], params, progress=False, trajectory=True)
    for one in (batch[0], batch[2]):
        assert one.trajectory is not None
        assert one.trajectory.steps.tolist() == seen.tolist()


def test_given_tokens_are_of_step_zero(llm: LLM) -> None:
    """A token that the request gave is certain, and no step commits it."""
    canvas = [MASK, 7, MASK, 9]
    params = SamplingParams(gen_length=4, block_length=4, steps=2, ignore_eos=True)
    steps, last = watched(llm, Prompt(PROMPT, canvas_ids=canvas), params)
    assert last.trajectory is not None
    assert last.trajectory.steps[[1, 3]].tolist() == [0, 0]
    assert last.trajectory.confidence[[1, 3]].tolist() == [1.0, 1.0]
    assert sorted(position for step in steps for position in step.committed) == [0, 2]


def test_a_stream_that_is_closed_is_cancelled(llm: LLM) -> None:
    """Nothing of it runs on; another call may run between its steps, and gets its own answer."""
    cancelled = llm.engine.stats.requests_cancelled
    (expected,) = llm.generate([4, 5], PARAMS, progress=False)
    stream = llm.stream(PROMPT, PARAMS)
    first = next(stream)
    assert isinstance(first, DenoisingStep)
    (between,) = llm.generate([4, 5], PARAMS, progress=False)
    assert between.token_ids.tolist() == expected.token_ids.tolist()
    stream.close()
    assert llm.engine.stats.requests_cancelled in (cancelled, cancelled + 1)
    assert not llm.engine.has_work


def test_a_bad_request_of_a_stream_names_the_field(llm: LLM) -> None:
    """It is refused at the first item, and the engine goes on."""
    with pytest.raises(InvalidRequest, match="^gen_length"):
        next(llm.stream(PROMPT, SamplingParams(gen_length=100_000)))
    assert not llm.engine.has_work
