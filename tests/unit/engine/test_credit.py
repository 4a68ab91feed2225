"""Credit lists equal the whole credit matrix until a list overflows, and lose little then."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from dllm_engine import LLM, SamplingParams
from dllm_engine.sampling.credit import ALPHA, BETA, GAMMA, LISTED, Credits, decide
from hypothesis import given
from hypothesis import strategies as st

VOCABULARY = 30
#: The most credit that an overflowing list may lose: of a token always best until 16 steps ago.
LEAST = BETA**LISTED / (1 - BETA)


@dataclasses.dataclass
class Position:
    """One position's list, and the same row of dInfer's matrix."""

    credits: Credits
    matrix: torch.Tensor

    @classmethod
    def empty(cls) -> Position:
        """The list at the start of a block."""
        tokens = torch.full((1, LISTED), -1)
        lists = Credits(torch.tensor([True]), tokens, torch.zeros(1, LISTED, dtype=torch.float64))
        return cls(lists, torch.zeros(VOCABULARY, dtype=torch.float64))

    def listed(self) -> dict[int, float]:
        """Credit by token."""
        pairs = zip(self.credits.tokens[0].tolist(), self.credits.values[0].tolist(), strict=True)
        return {token: value for token, value in pairs if token >= 0}

    def step(self, best: int, ahead: float) -> tuple[int, float]:
        """Run a step whose logits are 0 except for the best token; returns the chosen token and its
        confidence."""
        logits = torch.zeros(1, VOCABULARY, dtype=torch.float64)
        logits[0, best] = ahead
        tokens = self.credits.tokens
        of_list = logits.gather(1, tokens.clamp(min=0)).masked_fill(tokens < 0, -torch.inf)
        max_logit = logits[:, best]
        sum_exp = (logits - max_logit).exp().sum(dim=1)
        token, confidence, self.credits = decide(
            self.credits, of_list, torch.tensor([best]), max_logit, max_logit, sum_exp
        )
        self.matrix *= BETA
        self.matrix[best] += float(logits.softmax(1)[0, best]) ** GAMMA
        return int(token), float(confidence)


@given(st.lists(st.tuples(st.integers(0, LISTED - 1), st.floats(0.1, 9)), max_size=60))
def test_as_many_tokens_as_a_list_holds_are_exact(steps: list[tuple[int, float]]) -> None:
    """Until a list overflows, credit, token and confidence equal those of the whole matrix, for any
    length of block."""
    position = Position.empty()
    for best, ahead in steps:
        _, confidence = position.step(best, ahead)
        fused = ALPHA * position.matrix.log1p()
        fused[best] += ahead
        assert confidence == pytest.approx(float(fused.softmax(0).max()), abs=1e-9)
    for token in range(VOCABULARY):
        expected = float(position.matrix[token])
        assert position.listed().get(token, 0.0) == pytest.approx(expected, abs=1e-9)


def test_the_seventeenth_token_takes_the_place_of_the_least_credit() -> None:
    """The 17th different best token replaces the one with least credit, which starts from 0 if it
    is best again."""
    position = Position.empty()
    for best in range(LISTED + 1):
        assert len(position.listed()) == best
        position.step(best, 3.0)
    assert set(position.listed()) == set(range(1, LISTED + 1))
    position.step(0, 3.0)
    gain = (math.exp(3) / (math.exp(3) + VOCABULARY - 1)) ** GAMMA
    assert position.listed()[0] == pytest.approx(gain)
    assert float(position.matrix[0]) == pytest.approx(gain * (1 + BETA ** (LISTED + 1)))


@given(
    st.lists(st.tuples(st.integers(0, VOCABULARY - 1), st.floats(0.1, 9)), min_size=17, max_size=80)
)
def test_what_an_overflow_loses_is_less_than_a_tenth_of_a_logit(
    steps: list[tuple[int, float]],
) -> None:
    """A token that leaves a full list has little credit, and the latest token stays."""
    assert ALPHA * math.log1p(LEAST) < 0.1
    position = Position.empty()
    for best, ahead in [*((0, 9.0) for _ in range(20)), *steps]:
        before = position.listed()
        position.step(best, ahead)
        lost = {token: before[token] * BETA for token in before.keys() - position.listed().keys()}
        assert len(lost) <= 1
        assert all(credit <= LEAST for credit in lost.values())
        assert best in position.listed()


def test_a_block_longer_than_a_list_is_decoded_alike_alone_and_in_a_batch(llm: LLM) -> None:
    """A request with credit fills its block and does not affect other requests, even if lists
    overflow."""
    params = SamplingParams(
        gen_length=48,
        block_length=48,
        credit=True,
        confidence_threshold=1.0,
        ignore_eos=True,
        logits_eos_inf=True,
    )
    prompts = [[4, 5], [7, 8, 9]]
    together = llm.generate(prompts, params, progress=False)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = llm.generate([prompt], params, progress=False)[0]
        assert alone.usage.steps > LISTED
        assert (alone.confidence > 0).all()
        assert alone.token_ids.tolist() == answer.token_ids.tolist()
