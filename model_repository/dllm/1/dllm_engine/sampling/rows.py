"""Inputs and results of sampling, one entry per row."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torch import Tensor

from dllm_engine.ops.rows import Rows
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
class RowSampling(Rows):
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
    #: The same for all rows.
    flags: SamplingFlags
    #: Rows that need all their logits at once.
    num_full_logits: int


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
class Candidates(Rows):
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
    #: [rows, K]; log-softmax of the raw logits of the tokens to read, −∞ for none; None: no row of
    #: the step reads.
    read: Tensor | None = None
