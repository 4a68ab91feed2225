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

from dllm_engine.ops.rows import Rows

BETA, GAMMA, ALPHA = 0.8, 0.2, 0.7
#: Tokens listed per position: exact while no more than these were ever its best, so for the first
#: 16 steps of a block. After that a 17th replaces the one with least credit, whose credit is lost:
#: should that token be best again, it begins anew. Of 16 listed tokens one was last the best 16 or
#: more steps ago, so a loss is at most Σ β^j over j ≥ 16: 0.14, or less than a tenth of a logit.
LISTED = 16


@dataclasses.dataclass(frozen=True)
class Credits(Rows):
    """Credit lists of some rows; K = `LISTED`."""

    #: [rows] bool; whether the row uses credit.
    used: Tensor
    #: [rows, K] int64 tokens, −1 for an empty entry; and their float32 credit.
    tokens: Tensor
    values: Tensor


@dataclasses.dataclass(frozen=True)
class CreditRows:
    """Where the credit of a step's rows is in `CreditLists`."""

    #: [rows] int64.
    slots: Tensor
    column: Tensor
    #: [rows] bool; whether the row uses credit, and whether its list is empty.
    used: Tensor
    empty: Tensor


class CreditLists:
    """Credit lists of every position of all active blocks, on the device.

    A list means nothing in a block's first step, and for requests without credit.
    """

    def __init__(self, num_slots: int, max_block: int, device: str) -> None:
        shape = (num_slots, max_block, LISTED)
        self._tokens = torch.empty(shape, dtype=torch.int32, device=device)
        self._values = torch.empty(shape, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes of all lists."""
        return self._tokens.nbytes + self._values.nbytes

    def read(self, rows: CreditRows) -> Credits:
        """The lists of some rows."""
        empty = rows.empty.unsqueeze(1)
        tokens = self._tokens[rows.slots, rows.column].to(torch.int64)
        values = self._values[rows.slots, rows.column]
        return Credits(rows.used, tokens.masked_fill_(empty, -1), values.masked_fill_(empty, 0.0))

    def write(self, rows: CreditRows, credits: Credits) -> None:
        """Store the lists after a step."""
        self._tokens[rows.slots, rows.column] = credits.tokens.to(torch.int32)
        self._values[rows.slots, rows.column] = credits.values


def decide(
    credits: Credits,
    logits: Tensor,
    token: Tensor,
    logit: Tensor,
    max_logit: Tensor,
    sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Credits]:
    """Run one step of credit decoding for all rows.

    Args:
        credits: the lists before the step.
        logits: [rows, K]; logits of the listed tokens, −∞ for empty entries.
        token, logit: [rows]; the best token by plain logits, and its logit.
        max_logit, sum_exp: [rows]; largest logit, and Σ exp(ℓ − max_logit).

    Returns:
        The tokens chosen by fused logits and their confidence, [rows]; the lists after the step.
    """
    values = credits.values * BETA
    gain = ((logit - max_logit).exp() / sum_exp) ** GAMMA
    same = credits.tokens == token.unsqueeze(1)
    # A token that is not listed replaces the one with least credit; empty entries have none.
    least = values.argmin(dim=1, keepdim=True)
    place = torch.where(
        same.any(dim=1, keepdim=True), same.int().argmax(dim=1, keepdim=True), least
    )
    before = torch.where(same, values, 0.0).sum(dim=1)
    tokens = credits.tokens.scatter(1, place, token.unsqueeze(1))
    logits = logits.scatter(1, place, logit.unsqueeze(1))
    values = values.scatter(1, place, (before + gain).to(values.dtype).unsqueeze(1))

    bonus = ALPHA * values.log1p()
    # Relative to the largest: a bonus added to a large logit would be rounded away.
    logits = logits - max_logit.unsqueeze(1)
    best, at = (logits + bonus).max(dim=1)
    grown = sum_exp + (logits.exp() * bonus.expm1()).sum(dim=1)
    chosen = tokens.gather(1, at.unsqueeze(1)).squeeze(1)
    return chosen, best.exp() / grown, Credits(credits.used, tokens, values)
