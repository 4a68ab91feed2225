"""The language-model head of one rank: a slice of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.ops import TILE, Head
from dllm_engine.parallel.group import Group


class SlicedHead(Head):
    """A head that has the logits of its own tokens only; they go by their global ids.

    Args:
        weight: [vocab_size / size, hidden_size]; this rank's tokens.
        group: the ranks, which hold slices of equal size in their order.
        kernels: see `Head`.
    """

    def __init__(self, weight: Tensor, group: Group, *, kernels: bool = False) -> None:
        super().__init__(weight, kernels=kernels)
        self.group = group
        #: This rank's first token.
        self.first = group.rank * len(weight)
        self._mine = len(weight)
        self.vocab_size = self._mine * group.size

    @property
    def tile_starts(self) -> range:
        """First token of each of this rank's tiles."""
        return range(self.first, self.first + self._mine, TILE)

    def logits(self, hidden: Tensor, start: int) -> Tensor:
        """Logits of this rank's tile that begins at token `start`: [rows, up to TILE]."""
        return super().logits(hidden, start - self.first)

    def all_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary: [rows, vocab_size]; a collective call.

        For filters (top-p, top-k), which need a whole row; nothing else asks for it.
        """
        mine = torch.cat([self.logits(hidden, start) for start in self.tile_starts], dim=1)
        return torch.cat(self.group.gather(mine), dim=1)
