"""The language-model head of one rank: a slice of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.ops.dispatch import TORCH, Operations
from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import HeadOptions, HeadStatistics
from dllm_engine.parallel.group import Group
from dllm_engine.parallel.rank_merge import merge_over_ranks


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
