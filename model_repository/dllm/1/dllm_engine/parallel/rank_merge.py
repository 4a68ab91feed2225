"""Merges the head's statistics over the ranks that hold slices of the vocabulary."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dllm_engine.ops.head_types import HeadStatistics
from dllm_engine.parallel.group import Group


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
    return values.to(torch.float64).view(len(values), -1)


def _like(values: Tensor, column: Tensor) -> Tensor:
    return column.to(values.dtype).view(values.shape)
