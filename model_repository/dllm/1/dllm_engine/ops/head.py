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
    max_logit: Tensor
    second: Tensor
    #: Σ exp(l − max_logit), and the same sum_exp_logit with l − max_logit.
    sum_exp: Tensor
    sum_exp_logit: Tensor
    #: [rows, K]; logits of tokens that were asked for; −∞ of those that are not this head's.
    extra_logits: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """Which token of each row is best, and which count; what no row needs is None."""

    #: May never be chosen, but counts in the distribution.
    mask: int
    #: [n] int64; ids that rows with `logits_eos_inf` know nothing of.
    eos: Tensor
    #: [n] int64; ids that rows with `confidence_eos_eot_inf` may choose, but do not count.
    stop: Tensor
    #: [rows] bool.
    logits_eos_inf: Tensor | None
    confidence_eos_eot_inf: Tensor | None
    #: [rows] float64, 0 is greedy; and int64 keys of each row's noise (see `sampling.noise`).
    temperature: Tensor | None
    keys: Tensor | None
    #: Whether the second largest logit and the sum_exp_logit sum are asked for.
    needs_entropy: bool


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
        self, hidden: Tensor, options: HeadOptions, extra_tokens: Tensor | None = None
    ) -> HeadStatistics:
        """Statistics of the logits, which are never written to memory; without waiting.

        Args:
            hidden: [rows, hidden_size], of the weight's type.
            options: which tokens may be chosen, and count.
            extra_tokens: [rows, K] int64; tokens whose logits are wanted besides, −1 for none.
        """
        # Not at the top: the package triton is optional.
        from dllm_engine.ops.kernels.head import head_statistics

        assert self._weight is not None, "the head was made without kernels"
        return head_statistics(hidden, self._weight, self.first, options, extra_tokens)

    def statistics_bytes(self, *, noisy: bool, needs_entropy: bool) -> int:
        """Bytes per row that `statistics` takes while it runs."""
        from dllm_engine.ops.kernels.head import partial_bytes

        assert self._weight is not None, "the head was made without kernels"
        return partial_bytes(self._weight, noisy=noisy, needs_entropy=needs_entropy)
