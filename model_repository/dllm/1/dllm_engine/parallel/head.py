"""The language-model head of one rank, a slice of the vocabulary, and the merge of all ranks'."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from dllm_engine.ops.dispatch import TORCH, Operations
from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import HeadOptions, HeadStatistics
from dllm_engine.ops.log_probs import TokenLogits, merge_token_logits
from dllm_engine.parallel.group import Group


class SlicedHead(Head):
    """A head with the logits of this rank's tokens, which keep their global ids.

    Args:
        weight: [vocab_size / size, hidden_size]; this rank's tokens.
        group: the ranks, which hold slices of equal size in rank order.
        operations: see `Head`.
    """

    def __init__(self, weight: Tensor, group: Group, operations: Operations = TORCH) -> None:
        super().__init__(weight, operations, first=group.rank * len(weight))
        self._group = group
        self.vocab_size = len(weight) * group.size

    def all_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary: [rows, vocab_size]; a collective call.

        Only filters (top-p, top-k) need it.
        """
        return torch.cat(self._group.gather(super().all_logits(hidden)), dim=1)

    def statistics(
        self, hidden: Tensor, options: HeadOptions, extra_tokens: Tensor | None = None
    ) -> HeadStatistics:
        """Reduce the logits of the whole vocabulary to statistics; a collective call."""
        return merge_over_ranks(super().statistics(hidden, options, extra_tokens), self._group)

    def token_logits(
        self, hidden: Tensor, tokens: Tensor, *, mask: int, num_top: int
    ) -> TokenLogits:
        """Reduce the logits to what log-probabilities are made of; a collective call."""
        mine = super().token_logits(hidden, tokens, mask=mask, num_top=num_top)
        columns = [_column(values) for values in vars(mine).values()]
        widths = [column.shape[1] for column in columns]
        parts = []
        for table in self._group.gather(torch.cat(columns, dim=1)):
            values = zip(vars(mine).items(), torch.split(table, widths, dim=1), strict=True)
            parts.append(
                TokenLogits(**{name: _like(own, column) for (name, own), column in values})
            )
        return functools.reduce(lambda a, b: merge_token_logits(a, b, num_top), parts)


def merge_over_ranks(mine: HeadStatistics, group: Group) -> HeadStatistics:
    """The statistics that one rank with the whole vocabulary would have; a collective call.

    The ranks exchange a few numbers per row, for any size of the vocabulary, as float64: it
    represents each of them, and every token id, exactly.
    """
    fields = [f.name for f in dataclasses.fields(mine) if getattr(mine, f.name) is not None]
    columns = [_column(getattr(mine, name)) for name in fields]
    widths = [column.shape[1] for column in columns]
    merged: HeadStatistics | None = None
    for table in group.gather(torch.cat(columns, dim=1)):
        part = dict(zip(fields, torch.split(table, widths, dim=1), strict=True))
        theirs = dataclasses.replace(
            mine, **{name: _like(getattr(mine, name), column) for name, column in part.items()}
        )
        merged = theirs if merged is None else merge(merged, theirs)
    assert merged is not None
    return merged


def merge(left: HeadStatistics, right: HeadStatistics) -> HeadStatistics:
    """Statistics of two slices together; `left` has the lower token ids, which win ties."""
    better = right.score > left.score
    max_logit = torch.maximum(left.max_logit, right.max_logit)
    second = torch.maximum(left.second, right.second)
    extra_logits = None
    if left.extra_logits is not None and right.extra_logits is not None:
        # A token of another slice has logit −∞.
        extra_logits = torch.maximum(left.extra_logits, right.extra_logits)
    below_left, below_right = left.max_logit - max_logit, right.max_logit - max_logit
    scale_left, scale_right = below_left.exp(), below_right.exp()
    return HeadStatistics(
        token=torch.where(better, right.token, left.token),
        score=torch.where(better, right.score, left.score),
        logit=torch.where(better, right.logit, left.logit),
        max_logit=max_logit,
        second=torch.maximum(second, torch.minimum(left.max_logit, right.max_logit)),
        sum_exp=scale_left * left.sum_exp + scale_right * right.sum_exp,
        sum_exp_logit=scale_left * (left.sum_exp_logit + below_left * left.sum_exp)
        + scale_right * (right.sum_exp_logit + below_right * right.sum_exp),
        extra_logits=extra_logits,
    )


def _column(values: Tensor) -> Tensor:
    """float64 [rows, K] of [rows] or [rows, K]."""
    columns = values if values.dim() == 2 else values.unsqueeze(1)
    return columns.to(torch.float64)


def _like(values: Tensor, column: Tensor) -> Tensor:
    return column.to(values.dtype).view(values.shape)
