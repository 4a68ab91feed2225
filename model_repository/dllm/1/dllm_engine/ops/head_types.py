"""Inputs and results of the head's statistics."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor

#: Tokens per tile of the vocabulary. Equal for every batch, so that sums over tiles are always
#: taken in the same order.
TILE = 4096
#: Below every logit, and finite, so that differences from it are numbers.
LOWEST = -1e30


@dataclasses.dataclass
class HeadStatistics:
    """Reduced logits of each row; all [rows], in float32 or wider unless stated otherwise."""

    #: int64; the best token that may be chosen, by logit or by logit plus noise.
    token: Tensor
    #: float64; the score by which it won.
    score: Tensor
    #: Its logit.
    logit: Tensor
    #: Largest and second largest logit of the whole distribution.
    max_logit: Tensor
    second: Tensor
    #: Σ exp(l − max_logit), and Σ exp(l − max_logit)(l − max_logit).
    sum_exp: Tensor
    sum_exp_logit: Tensor
    #: [rows, K]; logits of the requested extra tokens; −∞ for tokens of another head.
    extra_logits: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """Which tokens may be chosen and which count. A field that no row needs is None."""

    #: This token is never chosen, but counts in the distribution.
    mask: int
    #: [n] int64; tokens that do not exist for rows with `logits_eos_inf`.
    eos: Tensor
    #: [n] int64; tokens that rows with `confidence_eos_eot_inf` may choose, but do not count.
    stop: Tensor
    #: [rows] bool.
    logits_eos_inf: Tensor | None
    confidence_eos_eot_inf: Tensor | None
    #: [rows] float64; 0 is greedy.
    temperature: Tensor | None
    #: [rows] int64; keys of each row's noise (see `ops.noise`).
    keys: Tensor | None
    #: Whether to compute `second` and `sum_exp_logit`.
    needs_entropy: bool


class TiledHead(Protocol):
    """The part of `Head` that its statistics are computed from."""

    #: [tokens, hidden_size]; absent if the head is packed, which it is not for kernels.
    weight: Tensor
    #: The first token that this head has logits of.
    first: int
    vocab_size: int

    @property
    def tile_starts(self) -> range:
        """First token of each tile."""

    def logits(self, hidden: Tensor, start: int) -> Tensor:
        """Logits of the tile that begins at token `start`: [rows, up to TILE]."""
