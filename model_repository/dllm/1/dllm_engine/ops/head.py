"""The language-model head: logits a tile of the vocabulary at a time, or their statistics alone."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.ops.linear import can_pack, pack, packed_linear

#: Vocabulary per tile. The same for every batch: sums over tiles are then taken in the same order.
TILE = 4096
#: Below every logit, and finite, so that differences from it are numbers.
LOWEST = -1e30


@dataclasses.dataclass
class HeadStatistics:
    """What is kept of each row's logits; all [rows]. float32, unless said otherwise or wider."""

    #: Best token that may be chosen, by logit or by logit and noise (int64); its score (float64);
    #: its logit.
    token: Tensor
    score: Tensor
    logit: Tensor
    #: Of the whole distribution: largest and second largest logit.
    peak: Tensor
    second: Tensor
    #: Σ exp(l − peak), and the same weighted with l − peak.
    total: Tensor
    weighted: Tensor
    #: [rows, K]; logits of tokens that were asked for; −∞ of those that are not this head's.
    listed: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which token of each row is best, and which count; what no row needs is None."""

    #: May never be chosen, but counts in the distribution.
    mask: int
    #: [n] int64; ids that rows with `no_eos` know nothing of.
    eos: Tensor
    #: [n] int64; ids that rows with `late_eos` may choose, but do not count.
    stop: Tensor
    #: [rows] bool.
    no_eos: Tensor | None
    late_eos: Tensor | None
    #: [rows] float64, 0 is greedy; and int64 keys of each row's noise (see `sampling.noise`).
    temperature: Tensor | None
    keys: Tensor | None
    #: Whether the second largest logit and the weighted sum are asked for.
    spread: bool


class Head:
    """Logits are `hidden @ weight.T`; nobody ever needs all of them at once.

    Args:
        weight: [vocab_size, hidden_size]; on a CPU it is copied into packed tiles.
        kernels: whether `statistics` may be asked for; nothing is packed then.
    """

    #: The first token that this head has logits of.
    first = 0

    def __init__(self, weight: Tensor, *, kernels: bool = False) -> None:
        self.vocab_size, self.hidden_size = weight.shape
        self.kernels = kernels
        self._weight = weight if kernels else None
        self._packed = self.packs(weight, kernels=kernels)
        tiles = torch.split(weight, TILE)
        self._tiles = [pack(tile.contiguous()) for tile in tiles] if self._packed else list(tiles)

    @staticmethod
    def packs(weight: Tensor, *, kernels: bool) -> bool:
        """Whether a head of this weight is a packed copy of it."""
        return can_pack(weight) and not kernels

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

    def statistics(
        self, hidden: Tensor, choice: Choice, listed: Tensor | None = None
    ) -> HeadStatistics:
        """Statistics of the logits, which are never written to memory; without waiting.

        Args:
            hidden: [rows, hidden_size], of the weight's type.
            choice: which tokens may be chosen, and count.
            listed: [rows, K] int64; tokens whose logits are wanted besides, −1 for none.
        """
        # Not at the top: the package triton is optional.
        from dllm_engine.ops.kernels.head import head_statistics

        assert self._weight is not None, "the head was made without kernels"
        return head_statistics(hidden, self._weight, self.first, choice, listed)

    def statistics_bytes(self, *, noisy: bool, spread: bool) -> int:
        """Bytes per row that `statistics` takes while it runs."""
        from dllm_engine.ops.kernels.head import partial_bytes

        assert self._weight is not None, "the head was made without kernels"
        return partial_bytes(self._weight, noisy=noisy, spread=spread)
