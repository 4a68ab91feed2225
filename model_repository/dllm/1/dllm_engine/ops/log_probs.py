"""Reduces the head's logits to log-probabilities of given tokens and the most probable tokens.

As in `head_statistics`, logits are made a tile of the vocabulary at a time and folded into a
running maximum m and Σ exp(l − m) (Milakov & Gimelshein 2018).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dllm_engine.ops.head_types import LOWEST, TiledHead
from dllm_engine.ops.rows import Rows, widen

#: Bytes per logit of a tile: the logit, a wider copy, its exponential, and the order of both.
LOG_PROB_BYTES = 24


@dataclasses.dataclass(frozen=True)
class TokenLogits(Rows):
    """What log-probabilities are made of, one entry per row; float32 or wider."""

    #: [rows]; logit of the row's given token; −∞ if another rank has it.
    chosen: Tensor
    #: [rows]; the largest logit m, and Σ exp(l − m), over the vocabulary with the mask token.
    max_logit: Tensor
    sum_exp: Tensor
    #: [rows, K]; the largest logits but the mask token's, descending, and their int64 tokens.
    top: Tensor
    top_tokens: Tensor

    @property
    def normalizer(self) -> Tensor:
        """log Σ exp(l): [rows]."""
        return self.max_logit + self.sum_exp.log()


def token_logits(
    head: TiledHead, hidden: Tensor, tokens: Tensor, *, mask: int, num_top: int
) -> TokenLogits:
    """Fold all tiles of a head; see `Head.token_logits`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    count = len(hidden)

    def column(value: float) -> Tensor:
        return torch.full((count,), value, dtype=wide, device=hidden.device)

    found = TokenLogits(
        chosen=column(-torch.inf),
        max_logit=column(LOWEST),
        sum_exp=column(0.0),
        top=hidden.new_empty(count, 0, dtype=wide),
        top_tokens=tokens.new_empty(count, 0),
    )
    for start in head.tile_starts:
        tile = widen(head.logits(hidden, start))
        found = merge_token_logits(found, _of_tile(tile, start, tokens, mask, num_top), num_top)
    return found


def _of_tile(tile: Tensor, start: int, tokens: Tensor, mask: int, num_top: int) -> TokenLogits:
    """The same of one tile alone, whose first token is `start`; overwrites the tile."""
    width = tile.shape[1]
    place = tokens - start
    here = (place >= 0) & (place < width)
    chosen = tile.gather(1, place.clamp(0, width - 1).unsqueeze(1)).squeeze(1)
    max_logit = tile.amax(dim=1)
    sum_exp = (tile - max_logit.unsqueeze(1)).exp_().sum(dim=1)
    if 0 <= mask - start < width:
        tile[:, mask - start] = -torch.inf
    top = tile.topk(min(num_top, width), dim=1)
    return TokenLogits(
        chosen.masked_fill(~here, -torch.inf), max_logit, sum_exp, top.values, top.indices + start
    )


def merge_token_logits(left: TokenLogits, right: TokenLogits, num_top: int) -> TokenLogits:
    """Join two parts of the vocabulary; `left` has the lower tokens, which go first in ties."""
    max_logit = torch.maximum(left.max_logit, right.max_logit)
    sum_exp = left.sum_exp * (left.max_logit - max_logit).exp()
    sum_exp += right.sum_exp * (right.max_logit - max_logit).exp()
    top, order = torch.cat([left.top, right.top], dim=1).sort(dim=1, descending=True, stable=True)
    tokens = torch.cat([left.top_tokens, right.top_tokens], dim=1).gather(1, order)
    return TokenLogits(
        torch.maximum(left.chosen, right.chosen),
        max_logit,
        sum_exp,
        top[:, :num_top],
        tokens[:, :num_top],
    )
