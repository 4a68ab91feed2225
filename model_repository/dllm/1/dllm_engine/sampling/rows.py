"""What sampling knows of each row, and what it finds: plain tensors side by side."""

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
    """What occurs among some rows; known to the host, so that it need not ask the device.

    True where a row might have it, false only where none has.
    """

    #: Temperatures above 0.
    noisy: bool
    #: A `top_p` below 1, and the largest `top_k`.
    top_p: bool
    top_k: int
    logits_eos_inf: bool
    confidence_eos_eot_inf: bool


def needs_full_logits(noisy: Truth, filtered: Truth, dream_statistics: Truth) -> Truth:
    """Whether a row's logits are needed all at once; at temperature 0 and without filters Dream's
    distribution is the clean one."""
    return (noisy & filtered) | (dream_statistics & (noisy | filtered))


@dataclasses.dataclass(frozen=True)
class RowSampling:
    """What sampling needs to know of each row: all [rows], on the model's device."""

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
    #: bool; statistics of the tempered and filtered distribution (Dream) instead of the clean.
    dream_statistics: Tensor
    #: bool; never choose an end-of-text token.
    logits_eos_inf: Tensor
    #: bool; confidence as if there were no end-of-text or end-of-turn tokens.
    confidence_eos_eot_inf: Tensor
    #: Of all rows together; how many of them are needed whole.
    flags: SamplingFlags
    num_full_logits: int

    def take(self, index: slice | Tensor) -> RowSampling:
        """The same of some rows."""
        names = [field.name for field in dataclasses.fields(self)]
        columns = [name for name in names if name not in ("flags", "num_full_logits")]
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in columns})


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids that sampling treats apart; int64 tensors on the model's device."""

    #: May never be chosen.
    mask: int
    #: [n]; end of text.
    eos: Tensor
    #: [n]; everything that ends an answer.
    stop: Tensor


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The chosen token of each row and how sure the model is of it; all [rows].

    Statistics are float32 (float64 for a float64 model), of softmax(logits) unless the row asks
    for the tempered distribution.
    """

    #: int64.
    token: Tensor
    #: Probability of the chosen token.
    confidence: Tensor
    #: Shannon entropy in nats.
    entropy: Tensor
    #: Difference of the two largest probabilities.
    margin: Tensor
    #: Credit after the step, where the step had any.
    credits: Credits | None = None

    def take(self, index: slice | Tensor) -> Candidates:
        """The candidates of some rows, without credit."""
        return Candidates(
            token=self.token[index],
            confidence=self.confidence[index],
            entropy=self.entropy[index],
            margin=self.margin[index],
        )


def joined(parts: Sequence[Candidates]) -> Candidates:
    """Concatenate the candidates of several groups of rows, without credit."""
    return Candidates(
        token=torch.cat([part.token for part in parts]),
        confidence=torch.cat([part.confidence for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        margin=torch.cat([part.margin for part in parts]),
    )
