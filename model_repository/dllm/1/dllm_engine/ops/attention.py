"""Bidirectional attention over packed sequences: no padding, no mask."""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """Where each sequence lies among the packed rows.

    Sequences stand one after another, sorted by length, so that those of equal length form one
    contiguous group which a single batched kernel call can take.
    """

    #: (first row, number of sequences, length of each), in row order.
    groups: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, lengths: list[int]) -> PackedLayout:
        """Layout of sequences with these lengths, which must be sorted."""
        groups = []
        start = 0
        for length, same in itertools.groupby(lengths):
            count = len(list(same))
            groups.append((start, count, length))
            start += count * length
        return cls(tuple(groups))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Softmax attention of every row to every row of its own sequence.

    Args:
        q: [rows, num_heads, head_dim].
        k, v: [rows, num_kv_heads, head_dim]; each serves num_heads / num_kv_heads query heads.
        layout: the sequences; rows behind the last one are padding and come back as zeros.

    Returns:
        [rows, num_heads * head_dim].
    """
    out = torch.zeros_like(q)
    for start, count, length in layout.groups:
        rows = slice(start, start + count * length)
        shape = (count, length, -1, q.shape[-1])
        mixed = F.scaled_dot_product_attention(
            q[rows].view(shape).transpose(1, 2),
            k[rows].view(shape).transpose(1, 2),
            v[rows].view(shape).transpose(1, 2),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[rows].view(shape).copy_(mixed.transpose(1, 2))
    return out.flatten(1)
