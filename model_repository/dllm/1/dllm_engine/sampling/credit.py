"""dInfer's credit decoding (arXiv 2510.08666): trust in tokens that stay ahead from step to step.

A credit C[i, t] for position i and token t, zero when a block begins; at every step

    C ← β·C,   C[i, top1ᵢ] += pᵢ^γ,   decide on ℓ + α·log(1 + C)

with top1 and p of the step's own distribution. Only tokens that were once a position's best have
credit, so a short list of (token, credit) stands for a row of the matrix, and of the fused
distribution only what the listed tokens change must be computed. One token is always among them:
the best by fused logits, since the best by plain ones is listed and no unlisted token gains.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

BETA, GAMMA, ALPHA = 0.8, 0.2, 0.7
#: Tokens listed per position: exact while no more than these were ever its best, so for the first
#: 16 steps of a block. After that a 17th replaces the one with least credit, whose credit is lost:
#: should that token be best again, it begins anew. Of 16 listed tokens one was last the best 16 or
#: more steps ago, so a loss is at most Σ β^j over j ≥ 16: 0.14, or less than a tenth of a logit.
LISTED = 16


@dataclasses.dataclass(frozen=True)
class Credits:
    """Lists of rows; K = `LISTED`."""

    #: [rows] bool; whether the row is decided by fused logits.
    used: Tensor
    #: [rows, K] int64, −1 where nothing is listed; and float32 credit.
    tokens: Tensor
    values: Tensor

    def take(self, index: slice | Tensor) -> Credits:
        """The same of some rows."""
        return Credits(self.used[index], self.tokens[index], self.values[index])


@dataclasses.dataclass(frozen=True)
class Fused:
    """The choice by fused logits, and the lists after it."""

    token: Tensor
    confidence: Tensor
    credits: Credits


@dataclasses.dataclass(frozen=True)
class CreditRows:
    """Which rows of a step have which places in `CreditLists`."""

    #: [rows] int64.
    slots: Tensor
    column: Tensor
    #: [rows] bool; whether it is decided by fused logits, and whether its list is empty.
    used: Tensor
    empty: Tensor


class CreditLists:
    """The lists of all requests: of every position of each active block, on the device.

    Of a block's first step, and of requests without credit, a list means nothing.
    """

    def __init__(self, num_slots: int, max_block: int, device: str) -> None:
        shape = (num_slots, max_block, LISTED)
        self._tokens = torch.empty(shape, dtype=torch.int32, device=device)
        self._values = torch.empty(shape, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory of all of it."""
        return self._tokens.nbytes + self._values.nbytes

    def read(self, rows: CreditRows) -> Credits:
        """The lists of some rows."""
        empty = rows.empty.unsqueeze(1)
        tokens = self._tokens[rows.slots, rows.column].to(torch.int64)
        values = self._values[rows.slots, rows.column]
        return Credits(rows.used, tokens.masked_fill_(empty, -1), values.masked_fill_(empty, 0.0))

    def write(self, rows: CreditRows, credits: Credits) -> None:
        """What they have become; of rows that use none it means nothing."""
        self._tokens[rows.slots, rows.column] = credits.tokens.to(torch.int32)
        self._values[rows.slots, rows.column] = credits.values


def decide(
    credits: Credits,
    logits: Tensor,
    token: Tensor,
    logit: Tensor,
    max_logit: Tensor,
    sum_exp: Tensor,
) -> Fused:
    """One step of credit decoding, for all rows.

    Args:
        credits: the lists before the step.
        logits: [rows, K]; logits of the listed tokens, −∞ where nothing is listed.
        token, logit: [rows]; the best token by plain logits, and its logit.
        max_logit, sum_exp: [rows]; largest logit, and Σ exp(ℓ − max_logit).
    """
    values = credits.values * BETA
    gain = ((logit - max_logit).exp() / sum_exp) ** GAMMA
    same = credits.tokens == token.unsqueeze(1)
    # Where it is not listed yet it takes the place of the least; empty places have no credit.
    least = values.argmin(dim=1, keepdim=True)
    place = torch.where(
        same.any(dim=1, keepdim=True), same.int().argmax(dim=1, keepdim=True), least
    )
    before = torch.where(same, values, 0.0).sum(dim=1)
    tokens = credits.tokens.scatter(1, place, token.unsqueeze(1))
    logits = logits.scatter(1, place, logit.unsqueeze(1))
    values = values.scatter(1, place, (before + gain).to(values.dtype).unsqueeze(1))

    bonus = ALPHA * values.log1p()
    best, at = (logits + bonus).max(dim=1)
    grown = sum_exp + ((logits - max_logit.unsqueeze(1)).exp() * bonus.expm1()).sum(dim=1)
    chosen = tokens.gather(1, at.unsqueeze(1)).squeeze(1)
    return Fused(chosen, (best - max_logit).exp() / grown, Credits(credits.used, tokens, values))
