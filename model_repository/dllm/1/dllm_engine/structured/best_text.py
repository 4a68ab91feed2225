"""Finds the most probable tokens that an automaton allows, by dynamic programming.

DINGO (arXiv 2505.23061): with W_0 = 0 at the state before the first position,

    W_{i+1}(q') = max over edges q -> q' of W_i(q) + max over the edge's tokens t of s_i(t)

where s_i(t) is the score of token t at position i. The best end state whose distance to an
accepting one fits into what is left of the canvas is traced back. With s_i(t) the logits, the
result is the most probable allowed string, if positions are independent. With Gumbel noise added to
logits / T it is the maximum of the perturbed sums ("perturb and MAP", Papandreou & Yuille 2011):
exactly softmax(logits / T) over the allowed tokens for a single position, and over all strings if
everything is allowed; in between an approximation of the model's distribution given the form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dllm_engine.structured.token_automaton import TokenAutomaton

Array = npt.NDArray[Any]

#: The least score of an allowed token: far below any, but the sum of many of them is a number.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Span:
    """Positions of one request from its first masked one on."""

    automaton: TokenAutomaton
    #: The state before the first position.
    state: int
    #: [n]; the tokens of the positions, -1 where masked.
    tokens: Array
    #: Tokens that may follow the last position.
    slack: int

    @property
    def num_masked(self) -> int:
        """Masked positions."""
        return int((self.tokens < 0).sum())


def class_maxima(scores: Array, automaton: TokenAutomaton) -> Array:
    """The best score of each class: [rows, C] of [rows, V]."""
    best: Array = np.maximum.reduceat(scores[:, automaton.members], automaton.member_starts, axis=1)
    return np.maximum(best, LOWEST, dtype=np.float64)


def best_classes(spans: Sequence[Span], maxima: Array) -> Array:
    """The class of the best token at each masked position.

    Args:
        spans: all of one automaton.
        maxima: [M, C]; of all masked positions, span by span.

    Returns:
        int64 [M].
    """
    automaton = spans[0].automaton
    length = max(len(span.tokens) for span in spans)
    scores = _set_scores(spans, maxima, length)
    best = np.full((length + 1, len(spans), automaton.num_states), -np.inf)
    best[0, np.arange(len(spans)), [span.state for span in spans]] = 0.0
    starts = automaton.target_starts[:-1]
    for i in range(length):
        # The edges of a column at once, for all requests.
        reached = best[i][:, automaton.source] + scores[i][:, automaton.edge_set]
        best[i + 1][:, automaton.targets] = np.maximum.reduceat(reached, starts, axis=1)
    found, first = np.empty(len(maxima), np.int64), 0
    for r, span in enumerate(spans):
        sets = _traced(span, best[:, r], scores[:, r])
        for label in sets[span.tokens < 0].tolist():
            found[first] = _best_of(automaton, label, maxima[first])
            first += 1
    return found


def _set_scores(spans: Sequence[Span], maxima: Array, length: int) -> Array:
    """The best score of each set of classes: [length, R, T]; of a decided token 0."""
    automaton = spans[0].automaton
    starts = automaton.set_starts
    of_rows = np.maximum.reduceat(maxima[:, automaton.set_classes], starts, axis=1)
    scores = np.full((length, len(spans), len(starts)), -np.inf)
    first = 0
    for r, span in enumerate(spans):
        masked = (span.tokens < 0).nonzero()[0]
        scores[masked, r] = of_rows[first : first + len(masked)]
        first += len(masked)
        for i in (span.tokens >= 0).nonzero()[0].tolist():
            label = automaton.class_of[span.tokens[i]]
            where = (automaton.set_classes == label).nonzero()[0]
            scores[i, r, np.searchsorted(starts, where, side="right") - 1] = 0.0
    return scores


def _traced(span: Span, best: Array, scores: Array) -> Array:
    """The set of classes that the best path takes at each position: [n]."""
    automaton, length = span.automaton, len(span.tokens)
    ends = np.where(automaton.distance <= span.slack, best[length], -np.inf)
    state = int(ends.argmax())
    sets = np.empty(length, np.int64)
    for i in range(length - 1, -1, -1):
        # A state that nothing leads to is met only where logits are not numbers.
        place = min(int(np.searchsorted(automaton.targets, state)), len(automaton.targets) - 1)
        edges = slice(automaton.target_starts[place], automaton.target_starts[place + 1])
        values = best[i, automaton.source[edges]] + scores[i, automaton.edge_set[edges]]
        edge = automaton.target_starts[place] + values.argmax()
        sets[i], state = automaton.edge_set[edge], int(automaton.source[edge])
    return sets


def _best_of(automaton: TokenAutomaton, label: int, maxima: Array) -> int:
    """The class of a set that has the best score."""
    start = automaton.set_starts[label]
    last = label + 1 == len(automaton.set_starts)
    classes = automaton.set_classes[start : None if last else automaton.set_starts[label + 1]]
    return int(classes[maxima[classes].argmax()])
