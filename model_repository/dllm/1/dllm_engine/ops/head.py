"""The language-model head, a tile of the vocabulary at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import can_pack, pack, packed_linear

#: Vocabulary per tile. The same for every batch: sums over tiles are then taken in the same order.
TILE = 4096


class Head:
    """Logits are `hidden @ weight.T`; nobody ever needs all of them at once.

    Args:
        weight: [vocab_size, hidden_size]; on a CPU it is copied into packed tiles.
    """

    def __init__(self, weight: Tensor) -> None:
        self.vocab_size, self.hidden_size = weight.shape
        self._packed = can_pack(weight)
        tiles = torch.split(weight, TILE)
        self._tiles = [pack(tile.contiguous()) for tile in tiles] if self._packed else list(tiles)

    @property
    def tile_starts(self) -> range:
        """First token of each tile."""
        return range(0, self.vocab_size, TILE)

    def logits(self, hidden: Tensor, start: int) -> Tensor:
        """Logits of the tile that begins at token `start`: [rows, up to TILE]."""
        tile = self._tiles[start // TILE]
        return packed_linear(hidden, tile) if self._packed else F.linear(hidden, tile)

    def all_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary: [rows, vocab_size]."""
        return torch.cat([self.logits(hidden, start) for start in self.tile_starts], dim=1)
