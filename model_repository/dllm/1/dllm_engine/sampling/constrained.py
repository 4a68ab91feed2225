"""Candidates of rows that an automaton decides together (see `structured.best_text`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_engine.ops import noise
from dllm_engine.ops.head import Head
from dllm_engine.ops.rows import ROW_MULTIPLE, forbid, pad_rows, widen
from dllm_engine.ops.transfer import Array
from dllm_engine.sampling.distributions import statistics, tempered
from dllm_engine.sampling.rows import Candidates, RowSampling, SpecialTokens, needs_full_logits
from dllm_engine.structured.best_text import LOWEST, Span, best_classes, class_maxima
from dllm_engine.structured.token_automaton import TokenAutomaton

#: Bytes per logit: the logit and its weight; with noise also float64 copies of both.
_BYTES, _NOISY_BYTES = 16, 64
#: What a token outside top-p and top-k loses: it is chosen only where the form leaves no other.
_FILTERED = 2.0**40


@dataclasses.dataclass(frozen=True)
class ConstrainedRows:
    """Which rows of a step an automaton decides; R requests."""

    #: int64; these rows, request by request; and all others.
    rows: Tensor
    others: Tensor
    #: int64 [M]; the place of each row in `rows` and then `others`.
    places: Tensor
    #: [R]; rows of each request.
    counts: tuple[int, ...]
    #: How many of the others need all their logits.
    num_full_logits: int


def from_automata(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    counts: Sequence[int],
    spans: Sequence[Span],
    budget_bytes: int,
    needs_entropy: bool,
) -> Candidates:
    """Candidates of constrained rows; see `sample_candidates`.

    Args:
        counts: rows of each request.
        spans: of each request; empty on a rank other than the first, whose tokens mean nothing.
    """
    row_bytes = head.vocab_size * (_NOISY_BYTES if rows.flags.noisy else _BYTES)
    chunk = max(ROW_MULTIPLE, budget_bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    parts, first, first_row = [], 0, 0
    while first < len(counts):
        # Whole requests: the automaton needs all rows of one.
        last, num_rows = first + 1, counts[first]
        while last < len(counts) and num_rows + counts[last] <= chunk:
            num_rows += counts[last]
            last += 1
        part = slice(first_row, first_row + num_rows)
        group = _Group(hidden[part], head, rows.take(part), special, needs_entropy, chunk)
        parts.append(group.candidates(spans[first:last]))
        first, first_row = last, first_row + num_rows
    return Candidates.joined(parts)


@dataclasses.dataclass
class _Group:
    """Rows of some requests, which are computed together.

    If they are more than a chunk, all logits are computed twice, so that memory stays bounded.
    """

    hidden: Tensor
    head: Head
    rows: RowSampling
    special: SpecialTokens
    needs_entropy: bool
    chunk: int

    def candidates(self, spans: Sequence[Span]) -> Candidates:
        slices = [slice(i, i + self.chunk) for i in range(0, len(self.hidden), self.chunk)]
        owners = [span for span in spans for _ in range(span.num_masked)]
        kept, maxima = None, []
        for part in slices:
            kept = self._scores(part)
            maxima.append(_maxima(kept[1], owners[part]))
        labels = _labels(spans, [row for rows in maxima for row in rows])
        parts = []
        for part in slices:
            logits, scores = kept if kept is not None and len(slices) == 1 else self._scores(part)
            token = _tokens(scores, owners[part], labels[part])
            parts.append(self._statistics(logits, scores, token, part))
        return Candidates.joined(parts)

    def _scores(self, part: slice) -> tuple[Tensor, Tensor]:
        """Logits, and what the best tokens have most of: both [rows, V]."""
        hidden, rows = self.hidden[part], self.rows.take(part)
        logits = widen(self.head.all_logits(pad_rows(hidden))[: len(hidden)])
        if not rows.flags.noisy:
            return logits, logits
        plain = logits.to(torch.float64)
        temperature = rows.temperature.unsqueeze(1)
        kept = self._tempered(logits, rows)
        scores = plain / torch.where(temperature > 0, temperature, 1.0)
        scores = torch.where(torch.isinf(kept), scores - _FILTERED, kept)
        keys = noise.row_keys(rows.seed, rows.step, rows.position, noise.STREAM_TOKEN)
        scores = scores + noise.gumbel(keys, logits.shape[1])
        return logits, torch.where(temperature > 0, scores, plain)

    def _tempered(self, logits: Tensor, rows: RowSampling) -> Tensor:
        """`tempered`, of logits without the mask token."""
        possible = logits.clone()
        possible[:, self.special.mask] = -torch.inf
        return tempered(possible, rows)

    def _statistics(self, logits: Tensor, scores: Tensor, token: Tensor, part: slice) -> Candidates:
        rows = self.rows.take(part)
        # torch sums a single row in another order than several.
        twice = torch.arange(max(2, len(logits)), device=logits.device) % len(logits)
        logits, token, rows = logits[twice], token[twice], rows.take(twice)
        if rows.flags.confidence_eos_eot_inf:
            forbid(logits, rows.confidence_eos_eot_inf, self.special.stop)
        inner = None
        filtered = (rows.top_p < 1) | (rows.top_k > 0)
        dream = rows.dream_statistics
        dream = dream & needs_full_logits(rows.temperature > 0, filtered, dream)
        if rows.num_full_logits:
            inner = statistics(self._tempered(logits, rows), token, self.needs_entropy)
        found = statistics(logits, token, self.needs_entropy)
        if inner is not None:
            both: dict[str, Any] = {
                name: torch.where(dream, getattr(inner, name).to(value.dtype), value)
                for name in ("confidence", "entropy", "margin")
                for value in [getattr(found, name)]
            }
            found = dataclasses.replace(found, **both)
        return found.take(slice(len(scores)))


def _by_automaton(owners: Sequence[Span]) -> dict[int, tuple[TokenAutomaton, list[int]]]:
    """The places of each automaton in a list of spans."""
    found: dict[int, tuple[TokenAutomaton, list[int]]] = {}
    for i, span in enumerate(owners):
        found.setdefault(id(span.automaton), (span.automaton, []))[1].append(i)
    return found


def _maxima(scores: Tensor, owners: Sequence[Span]) -> list[Array]:
    """The best score of each class of the row's automaton, row by row."""
    found: list[Array] = [np.zeros(0)] * len(owners)
    for automaton, rows in _by_automaton(owners).values():
        if scores.device.type == "cpu":
            best = class_maxima(scores.numpy()[rows], automaton)
        else:
            best = _device_maxima(scores[rows], automaton)
        for row, values in zip(rows, best, strict=True):
            found[row] = values
    return found


def _device_maxima(scores: Tensor, automaton: TokenAutomaton) -> Array:
    """`class_maxima` on the scores' device; one more class takes all other tokens."""
    labels = torch.from_numpy(automaton.class_of).to(scores.device, torch.int64)
    num_classes = len(automaton.member_starts)
    best = torch.full((len(scores), num_classes + 1), LOWEST, device=scores.device).to(scores.dtype)
    best.scatter_reduce_(1, labels.expand_as(scores), scores, "amax")
    result: Array = best[:, :num_classes].to(torch.float64).cpu().numpy()
    return result


def _labels(spans: Sequence[Span], maxima: Sequence[Array]) -> list[int]:
    """The class of each row's token."""
    starts = np.cumsum([0, *(span.num_masked for span in spans)]).tolist()
    labels = [0] * starts[-1]
    for _, which in _by_automaton(spans).values():
        rows = [row for i in which for row in range(starts[i], starts[i + 1])]
        found = best_classes([spans[i] for i in which], np.stack([maxima[row] for row in rows]))
        for row, label in zip(rows, found.tolist(), strict=True):
            labels[row] = label
    return labels


def _tokens(scores: Tensor, owners: Sequence[Span], labels: Sequence[int]) -> Tensor:
    """The best token of the class of each row: int64 [rows]."""
    if not owners:
        return torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    if scores.device.type == "cpu":
        members = [o.automaton.tokens_of(label) for o, label in zip(owners, labels, strict=True)]
        rows = scores.numpy()
        best = [int(m[row[m].argmax()]) for m, row in zip(members, rows, strict=True)]
        return torch.tensor(best, dtype=torch.int64)
    token = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    for automaton, which in _by_automaton(owners).values():
        class_of = torch.from_numpy(automaton.class_of).to(scores.device, torch.int64)
        wanted = torch.tensor([labels[row] for row in which], device=scores.device)
        inside = class_of == wanted.unsqueeze(1)
        token[which] = scores[which].masked_fill(~inside, -torch.inf).argmax(dim=1)
    return token
