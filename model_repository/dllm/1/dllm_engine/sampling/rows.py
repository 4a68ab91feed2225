"""Inputs and results of sampling, one entry per row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dllm_engine.sampling.credit import Credits

Truth = TypeVar("Truth", bool, Tensor)


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """Which parameters some rows use, known on the host without asking the device.

    A flag is true if a row might use the parameter, and false only if no row does.
    """

    #: Whether a temperature is above 0.
    noisy: bool
    #: Whether a `top_p` is below 1.
    top_p: bool
    #: The largest `top_k`.
    top_k: int
    logits_eos_inf: bool
    confidence_eos_eot_inf: bool


def needs_full_logits(noisy: Truth, filtered: Truth, dream_statistics: Truth) -> Truth:
    """Whether a row needs all its logits at once.

    At temperature 0 and without filters, Dream's distribution equals the clean one.
    """
    return (noisy & filtered) | (dream_statistics & (noisy | filtered))


@dataclasses.dataclass(frozen=True)
class RowSampling:
    """Sampling parameters of each row: all [rows], on the model's device."""

    #: float64; 0 is greedy.
    temperature: Tensor
    #: int64.
    seed: Tensor
    step: Tensor
    #: int64, absolute position in the sequence.
    position: Tensor
    #: float64; 1 is off.
    top_p: Tensor
    #: int64; 0 is off.
    top_k: Tensor
    #: bool; take statistics from the tempered and filtered distribution, as Dream does.
    dream_statistics: Tensor
    #: bool; never choose an end-of-text token.
    logits_eos_inf: Tensor
    #: bool; confidence as if there were no end-of-text or end-of-turn tokens.
    confidence_eos_eot_inf: Tensor
    #: Of all rows together.
    flags: SamplingFlags
    #: Rows that need all their logits at once.
    num_full_logits: int

    def take(self, index: slice | Tensor) -> RowSampling:
        """The parameters of some rows."""
        names = [field.name for field in dataclasses.fields(self)]
        columns = [name for name in names if name not in ("flags", "num_full_logits")]
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in columns})


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Tokens with a special meaning; int64 tensors on the model's device."""

    #: The mask token, which is never chosen.
    mask: int
    #: [n]; end of text.
    eos: Tensor
    #: [n]; all tokens that end an answer.
    stop: Tensor


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The chosen token of each row and the model's confidence in it; all [rows].

    Statistics are float32 (float64 for a float64 model), of softmax(logits) unless the row uses
    Dream's statistics.
    """

    #: int64.
    token: Tensor
    #: Probability of the chosen token.
    confidence: Tensor
    #: Shannon entropy in nats.
    entropy: Tensor
    #: Difference of the two largest probabilities.
    margin: Tensor
    #: Credit after the step; None: no row of the step uses credit.
    credits: Credits | None = None

    def take(self, index: slice | Tensor) -> Candidates:
        """The candidates of some rows."""
        return Candidates(
            token=self.token[index],
            confidence=self.confidence[index],
            entropy=self.entropy[index],
            margin=self.margin[index],
            credits=None if self.credits is None else self.credits.take(index),
        )


def joined(parts: Sequence[Candidates]) -> Candidates:
    """Concatenate the candidates of several groups of rows."""
    lists = [part.credits for part in parts if part.credits is not None]
    return Candidates(
        token=torch.cat([part.token for part in parts]),
        confidence=torch.cat([part.confidence for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        margin=torch.cat([part.margin for part in parts]),
        credits=Credits.joined(lists) if lists else None,
    )
