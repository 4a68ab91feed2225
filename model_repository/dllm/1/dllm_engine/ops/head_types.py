"""Inputs and results of the head's statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dllm_engine.ops.rows import Rows

#: Tokens per tile of the vocabulary. Equal for every batch, so that sums over tiles are always
#: taken in the same order.
TILE = 4096
#: Below every logit, and finite, so that differences from it are numbers.
LOWEST = -1e30
#: Lower temperatures count as this one, at which noise changes no float32 logit either.
_LEAST_TEMPERATURE = 1e-24


@dataclasses.dataclass
class HeadStatistics:
    """Reduced logits of each row; all [rows], in float32 or wider unless stated otherwise."""

    #: int64; the best token that may be chosen, by logit or by logit plus noise.
    token: Tensor
    #: The score by which it won.
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

    @classmethod
    def joined(cls, parts: Sequence[HeadStatistics]) -> HeadStatistics:
        """Statistics of several groups of rows, without extra logits."""
        if len(parts) == 1:
            return parts[0]
        names = [f.name for f in dataclasses.fields(cls) if f.name != "extra_logits"]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


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
    #: [rows] in float32 or wider; 1 / T, 0 is greedy. See `inverse_of`.
    inverse_temperature: Tensor | None
    #: [rows] int64; keys of each row's noise (see `ops.noise`).
    keys: Tensor | None
    #: Whether to compute `second` and `sum_exp_logit`.
    needs_entropy: bool

    def take(self, index: slice) -> HeadOptions:
        """Those of some rows."""
        names = ("logits_eos_inf", "confidence_eos_eot_inf", "inverse_temperature", "keys")
        columns = {name: getattr(self, name) for name in names}
        some = {name: column[index] for name, column in columns.items() if column is not None}
        return dataclasses.replace(self, **some)


@dataclasses.dataclass(frozen=True)
class Filters(Rows):
    """Filters of some rows, which need all logits at once; tensors are [rows]."""

    #: float64; 1 is off.
    top_p: Tensor
    #: int64; 0 is off.
    top_k: Tensor
    #: bool; statistics are those of the tempered and filtered distribution, as Dream's.
    tempered: Tensor
    #: Whether a `top_p` is below 1, and the largest `top_k`.
    uses_top_p: bool
    most_top_k: int


def inverse_of(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / T in `dtype`, 0 where T is 0; bounded, so that its product with a logit is finite."""
    inverse = torch.where(temperature > 0, 1 / temperature.clamp(min=_LEAST_TEMPERATURE), 0.0)
    return inverse.to(dtype)


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
