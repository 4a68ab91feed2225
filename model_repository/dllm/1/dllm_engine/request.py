"""What a caller asks for, and what comes back. Plain data: no torch, nothing of ours but errors."""

from __future__ import annotations

import dataclasses
import enum
import math
import secrets
from typing import TYPE_CHECKING

from .errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

REMASKING_RULES = ("low_confidence", "random")
CACHE_POLICIES = ("none",)
DEFAULT_BLOCK_LENGTH = 32
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    #: End-of-text token or stop string.
    STOP = "stop"
    #: The whole canvas is decoded.
    LENGTH = "length"
    #: The caller went away or cancelled.
    CANCELLED = "cancelled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one canvas is denoised. Names are the papers' (LLaDA `generate`, Fast-dLLM).

    `validate` checks every value; nothing is checked at construction.
    """

    #: 0: greedy. Above: Gumbel-max over logits / temperature, in float64.
    temperature: float = 0.0
    #: Canvas length in tokens.
    gen_length: int = 32
    #: Denoising steps over the whole canvas; None: `gen_length`, one token per step.
    steps: int | None = None
    #: Tokens per semi-autoregressive block; None: 32, or the canvas where that is shorter.
    block_length: int | None = None
    #: Classifier-free guidance; 0: off.
    cfg_scale: float = 0.0
    #: Which positions are committed first.
    remasking: str = "low_confidence"
    #: Commit every position at least this confident (and always the best): parallel decoding.
    confidence_threshold: float | None = None
    #: Nucleus sampling; applies at temperature > 0.
    top_p: float | None = None
    #: Sample from the k best tokens; applies at temperature > 0.
    top_k: int | None = None
    #: Same request and seed: same text. None: drawn at random and reported.
    seed: int | None = None
    #: The text ends before the first of these.
    stop: tuple[str, ...] = ()
    #: Decode the whole canvas even after an end-of-text token.
    ignore_eos: bool = False
    #: Key/value reuse between steps.
    cache: str = "none"
    #: Fraction of positions that `cache="sparse"` keeps.
    retention_ratio: float | None = None

    def resolved(self) -> SamplingParams:
        """The same parameters, checked, with every default that depends on others filled in.

        Raises:
            InvalidRequest: a value is out of range; names the field and the limit.
        """
        _check_ranges(self)
        block_length = self.block_length or min(DEFAULT_BLOCK_LENGTH, self.gen_length)
        num_blocks = math.ceil(self.gen_length / block_length)
        steps = self.gen_length if self.steps is None else self.steps
        if steps < num_blocks:
            raise InvalidRequest(
                "steps",
                f"must be at least the number of blocks, {num_blocks} "
                f"(gen_length {self.gen_length} / block_length {block_length}); got {steps}",
            )
        # 53 bits: a seed reported in JSON survives clients whose numbers are doubles.
        seed = secrets.randbits(53) if self.seed is None else self.seed
        return dataclasses.replace(self, block_length=block_length, steps=steps, seed=seed)


def _require(field: str, ok: bool, rule: str, value: object) -> None:
    if not ok:
        raise InvalidRequest(field, f"must be {rule}; got {value}")


def _check_ranges(p: SamplingParams) -> None:
    _require("temperature", 0 <= p.temperature < math.inf, "0 or more", p.temperature)
    _require("gen_length", p.gen_length >= 1, "at least 1", p.gen_length)
    if p.steps is not None:
        _require("steps", p.steps >= 1, "at least 1", p.steps)
    if p.block_length is not None:
        ok = 1 <= p.block_length <= p.gen_length
        _require("block_length", ok, f"1 to gen_length ({p.gen_length})", p.block_length)
    _require("cfg_scale", 0 <= p.cfg_scale < math.inf, "0 or more", p.cfg_scale)
    rules = ", ".join(REMASKING_RULES)
    _require("remasking", p.remasking in REMASKING_RULES, f"one of {rules}", repr(p.remasking))
    tau = p.confidence_threshold
    if tau is not None:
        _require("confidence_threshold", 0 < tau <= 1, "above 0 and at most 1", tau)
    if p.top_p is not None:
        _require("top_p", 0 < p.top_p <= 1, "above 0 and at most 1", p.top_p)
    if p.top_k is not None:
        _require("top_k", p.top_k >= 1, "at least 1", p.top_k)
    if p.seed is not None:
        _require("seed", -(2**63) <= p.seed < 2**63, "a 64-bit integer", p.seed)
    _check_stop(p.stop)
    policies = ", ".join(CACHE_POLICIES)
    _require("cache", p.cache in CACHE_POLICIES, f"one of {policies}", repr(p.cache))
    if p.retention_ratio is not None:
        raise InvalidRequest("retention_ratio", f"applies to no cache policy of: {policies}")


def _check_stop(stop: tuple[str, ...]) -> None:
    limit = f"at most {MAX_STOP_STRINGS} strings"
    _require("stop", len(stop) <= MAX_STOP_STRINGS, limit, f"{len(stop)} strings")
    for text in stop:
        rule = f"strings of 1 to {MAX_STOP_CHARS} characters"
        _require("stop", 1 <= len(text) <= MAX_STOP_CHARS, rule, f"{len(text)} characters")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a request cost so far."""

    prompt_tokens: int
    #: Tokens of the answer, the end-of-text token included.
    completion_tokens: int
    #: Denoising steps run.
    steps: int
    #: Sequences pushed through the model; with guidance two per step.
    forward_passes: int


@dataclasses.dataclass(frozen=True)
class CanvasUpdate:
    """A request's canvas after a step. Text is made from it by `TextCodec.answer`."""

    request_id: int
    #: [gen_length] int32; positions not decoded yet hold the mask id.
    token_ids: npt.NDArray[np.int32]
    #: [gen_length] float32; the probability each position was committed with, −1 while masked.
    confidence: npt.NDArray[np.float32]
    #: Tokens from the left that are final, short of an end-of-text token.
    num_ready: int
    usage: Usage
    seed: int
    #: None while running.
    finish_reason: FinishReason | None = None
    #: Set instead of a finish reason when the request failed.
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last update."""
        return self.finish_reason is not None or self.error is not None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request, as `LLM.generate` returns it."""

    text: str
    token_ids: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]
    finish_reason: FinishReason
    usage: Usage
    seed: int
