"""The language-model head: logits a tile of the vocabulary at a time, or their statistics alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.ops.dispatch import TORCH, Operations
from dllm_engine.ops.head_types import TILE, Filters, HeadOptions, HeadStatistics
from dllm_engine.ops.linear import can_pack, pack, packed_linear
from dllm_engine.ops.log_probs import TokenLogits, token_logits
from dllm_engine.ops.rows import widen


class Head:
    """Logits are `hidden @ weight.T`; they never all exist at once.

    Args:
        weight: [tokens, hidden_size]; on a CPU the head copies it into packed tiles.
        operations: computes the statistics; nothing is packed for kernels.
        first: the first token that this head has logits of.
    """

    #: Absent if the head is packed.
    weight: Tensor

    def __init__(self, weight: Tensor, operations: Operations = TORCH, first: int = 0) -> None:
        self.first = first
        self.vocab_size = self._num_tokens = len(weight)
        self._operations = operations
        self.packed = self.packs(weight, operations)
        tiles = torch.split(weight, TILE)
        if self.packed:
            self.tiles = [pack(tile.contiguous()) for tile in tiles]
        else:
            self.weight, self.tiles = weight, list(tiles)

    @staticmethod
    def packs(weight: Tensor, operations: Operations) -> bool:
        """Whether a head of this weight holds a packed copy of it."""
        return can_pack(weight) and not operations.kernels

    @property
    def tile_starts(self) -> range:
        """First token of each tile."""
        return range(self.first, self.first + self._num_tokens, TILE)

    def logits(self, hidden: Tensor, start: int) -> Tensor:
        """Logits of the tile that begins at token `start`: [rows, up to TILE]."""
        tile = self.tiles[(start - self.first) // TILE]
        return packed_linear(hidden, tile) if self.packed else F.linear(hidden, tile)

    def all_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary: [rows, vocab_size]."""
        if not self.packed:
            return F.linear(hidden, self.weight)
        return torch.cat([self.logits(hidden, start) for start in self.tile_starts], dim=1)

    def statistics(
        self, hidden: Tensor, options: HeadOptions, extra_tokens: Tensor | None = None
    ) -> HeadStatistics:
        """Reduce the logits of the whole vocabulary to statistics.

        Args:
            hidden: [rows, hidden_size], of the weight's type.
            options: which tokens may be chosen, and count.
            extra_tokens: [rows, K] int64; tokens whose logits to return as well, −1 for none.
        """
        return self._operations.head_statistics(self, hidden, options, extra_tokens)

    def draw(self, logits: Tensor, options: HeadOptions, filters: Filters) -> HeadStatistics:
        """Draw tokens under filters from `all_logits`, which are overwritten."""
        if not self._operations.kernels:
            logits = widen(logits)
        return self._operations.draw(logits, options, filters)

    def draw_bytes(self) -> tuple[int, int]:
        """Bytes that all logits and `draw` take per row, and once."""
        element_size = self.tiles[0].element_size()
        return self._operations.draw_bytes(self.vocab_size, element_size)

    def token_logits(
        self, hidden: Tensor, tokens: Tensor, *, mask: int, num_top: int
    ) -> TokenLogits:
        """Reduce the logits to what log-probabilities are made of.

        Args:
            hidden: [rows, hidden_size]; rows in a multiple of `ROW_MULTIPLE`.
            tokens: [rows] int64; a token of each row.
            mask: the mask token, which is not listed.
            num_top: how many of the largest logits to list.
        """
        return token_logits(self, hidden, tokens, mask=mask, num_top=num_top)

    def statistics_bytes(self, *, noisy: bool, needs_entropy: bool) -> int:
        """Bytes per row that `statistics` takes while it runs."""
        return self._operations.head_statistics_bytes(self, noisy, needs_entropy)
