"""Compares log-probabilities and steps of reveal with those of a plain loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from dllm_engine import CanvasUpdate, Completion
from torch import Tensor


def assert_log_probs(
    answer: CanvasUpdate | Completion,
    expected: Sequence[Tensor | None],
    *,
    mask: int,
    num_top: int | None,
    abs: float = 1e-5,
) -> None:
    """Each committed token has its log-softmax, and the `num_top` largest besides the mask's.

    Args:
        answer: what the engine found.
        expected: the log-softmax of the vocabulary at each position; None where none is committed.
        mask: the mask token.
        num_top: what the request asked for; None: it asked for none.
        abs: how far a value may be off.
    """
    found = answer.log_probs
    if num_top is None:
        assert found is None
        return
    assert found is not None
    assert found.top.shape == found.top_tokens.shape == (len(expected), num_top)
    for position, whole in enumerate(expected):
        chosen, top = found.chosen[position], found.top[position]
        tokens = found.top_tokens[position].tolist()
        if whole is None:
            assert np.isnan([chosen, *top]).all()
            assert tokens == [-1] * num_top
            continue
        token = int(answer.token_ids[position])
        assert chosen == pytest.approx(float(whole[token]), abs=abs)
        best = whole.clone()
        best[mask] = -float("inf")
        assert top.tolist() == pytest.approx(best.topk(num_top).values.tolist(), abs=abs)
        # Of equal ones any may be listed.
        assert top.tolist() == pytest.approx(whole[tokens].tolist(), abs=abs)
        assert len(set(tokens)) == num_top
        assert mask not in tokens
