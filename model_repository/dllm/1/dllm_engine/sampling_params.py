"""How a request is denoised: the parameters, their ranges and their defaults. No torch."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping
from typing import Any

from dllm_engine.decoding import ALG, COMMIT_FIELDS, COMPANIONS, REMASKING, is_given
from dllm_engine.errors import InvalidRequest

CACHE_POLICIES = ("none", "prefix", "dual", "sparse", "delayed")
#: Parameters of caching, and the policies that each applies to.
CACHE_FIELDS = {
    "cache": CACHE_POLICIES,
    "retention_ratio": ("sparse",),
    "pool_kernel": ("sparse",),
    "delay_steps": CACHE_POLICIES[1:],
    "refresh_interval": CACHE_POLICIES[1:],
}
DEFAULT_BLOCK_LENGTH = 32
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256


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
    #: Which positions are committed first; with `alg` or a threshold it plays no part.
    remasking: str = "low_confidence"
    #: Commit every position at least this confident (and always the best): parallel decoding.
    confidence_threshold: float | None = None
    #: Fast-dLLM's factor: commit the longest run of n best with confidence ≥ 1 − factor / (n + 1).
    factor: float | None = None
    #: EB-sampler: commit the most certain while the entropies before them sum to at most this.
    entropy_bound: float | None = None
    #: dInfer's hierarchical decoding: with `confidence_threshold`, besides the best position of
    #: each run of masks if above this.
    low_threshold: float | None = None
    #: dInfer's credit decoding: with `confidence_threshold`, trust tokens that stay ahead.
    credit: bool = False
    #: LocalLeap as dlmserve has it, on the schedule: around positions committed with at least this
    #: confidence, commit neighbours too …
    anchor_threshold: float | None = None
    #: … that are at least this confident.
    neighbor_threshold: float | None = None
    #: Dream's algorithms, instead of `remasking`: time schedule, statistics after temperature,
    #: top-p and top-k.
    alg: str | None = None
    #: Above 0, Dream draws the positions from softmax(score / alg_temp) instead of taking the best.
    alg_temp: float = 0.0
    #: Nucleus sampling; applies at temperature > 0, and to the statistics of `alg`.
    top_p: float | None = None
    #: Sample from the k best tokens; likewise.
    top_k: int | None = None
    #: Same request and seed: same text. None: drawn at random and reported.
    seed: int | None = None
    #: Never choose the end-of-text token (LLaDA's evaluation settings).
    logits_eos_inf: bool = False
    #: Commit end-of-text and end-of-turn tokens last: their confidence is 0, and they do not count
    #: in the others' (likewise; at temperature > 0 the reference suppresses only end of turn).
    confidence_eos_eot_inf: bool = False
    #: The text ends before the first of these.
    stop: tuple[str, ...] = ()
    #: Decode the whole canvas even after an end-of-text token.
    ignore_eos: bool = False
    #: Key/value reuse between steps, one of `CACHE_POLICIES`; None, here and below: the server's.
    cache: str | None = None
    #: Fraction of the positions outside the block that each KV head keeps (`sparse`).
    retention_ratio: float | None = None
    #: Width of the max-pooling over scores before that choice (`sparse`); odd.
    pool_kernel: int | None = None
    #: Steps of a block that run in full before the one that stores keys and values.
    delay_steps: int | None = None
    #: Steps between Refreshes within a block; 0: only at its start.
    refresh_interval: int | None = None

    def with_cache_defaults(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The same parameters with what they leave open of caching taken from `defaults`.

        Raises:
            InvalidRequest: a parameter is given that does not apply to the policy.
        """
        given = {name for name in CACHE_FIELDS if getattr(self, name) is not None}
        missing = {name: defaults[name] for name in CACHE_FIELDS if name not in given}
        filled = dataclasses.replace(self, **missing)
        _check_cache(filled)
        for name in sorted(given):
            policies = CACHE_FIELDS[name]
            if filled.cache not in policies:
                rule = f"applies to cache {', '.join(policies)}"
                raise InvalidRequest(name, f"{rule}; got cache {filled.cache}")
        return filled

    def resolved(self) -> SamplingParams:
        """The same parameters, checked, with every default that depends on others filled in.

        Raises:
            InvalidRequest: a value is out of range; names the field and the limit.
        """
        _check_ranges(self)
        # Dream's algorithms know no blocks: the canvas is one.
        default = self.gen_length if self.alg else min(DEFAULT_BLOCK_LENGTH, self.gen_length)
        block_length = self.block_length or default
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
    rules = ", ".join(REMASKING)
    _require("remasking", p.remasking in REMASKING, f"one of {rules}", repr(p.remasking))
    fractions = ("confidence_threshold", "low_threshold", "anchor_threshold")
    for name in (*fractions, "neighbor_threshold", "top_p"):
        value = getattr(p, name)
        if value is not None:
            _require(name, 0 < value <= 1, "above 0 and at most 1", value)
    for name in ("factor", "entropy_bound"):
        value = getattr(p, name)
        if value is not None:
            _require(name, 0 <= value < math.inf, "0 or more", value)
    _check_combination(p)
    if p.top_k is not None:
        _require("top_k", p.top_k >= 1, "at least 1", p.top_k)
    if p.seed is not None:
        _require("seed", -(2**63) <= p.seed < 2**63, "a 64-bit integer", p.seed)
    _check_stop(p.stop)
    _check_cache(p)


def _check_combination(p: SamplingParams) -> None:
    given = [name for name in COMMIT_FIELDS if getattr(p, name) is not None]
    if len(given) > 1:
        raise InvalidRequest(given[1], f"cannot be combined with {given[0]}")
    for name, needed in COMPANIONS.items():
        if is_given(getattr(p, name)) and getattr(p, needed) is None:
            raise InvalidRequest(name, f"needs {needed}")
    if p.credit:
        for other, asked in (
            ("alg", p.alg is not None),
            ("temperature above 0", p.temperature > 0),
            ("confidence_eos_eot_inf", p.confidence_eos_eot_inf),
        ):
            if asked:
                raise InvalidRequest("credit", f"cannot be combined with {other}")
    if p.alg is None:
        _require("alg_temp", p.alg_temp == 0, "0 without alg", p.alg_temp)
        return
    algorithms = ", ".join(ALG)
    _require("alg", p.alg in ALG, f"one of {algorithms}", repr(p.alg))
    _require("alg_temp", 0 <= p.alg_temp < math.inf, "0 or more", p.alg_temp)
    if p.confidence_eos_eot_inf:
        given.append("confidence_eos_eot_inf")
    if given:
        raise InvalidRequest(given[0], "cannot be combined with alg")


def _check_cache(p: SamplingParams) -> None:
    if p.cache is not None:
        policies = ", ".join(CACHE_POLICIES)
        _require("cache", p.cache in CACHE_POLICIES, f"one of {policies}", repr(p.cache))
    if p.retention_ratio is not None:
        ratio = p.retention_ratio
        _require("retention_ratio", 0 < ratio <= 1, "above 0 and at most 1", ratio)
    if p.pool_kernel is not None:
        ok = p.pool_kernel >= 1 and p.pool_kernel % 2 == 1
        _require("pool_kernel", ok, "odd and at least 1", p.pool_kernel)
    for name in ("delay_steps", "refresh_interval"):
        value = getattr(p, name)
        if value is not None:
            _require(name, value >= 0, "0 or more", value)


def _check_stop(stop: tuple[str, ...]) -> None:
    limit = f"at most {MAX_STOP_STRINGS} strings"
    _require("stop", len(stop) <= MAX_STOP_STRINGS, limit, f"{len(stop)} strings")
    for text in stop:
        rule = f"strings of 1 to {MAX_STOP_CHARS} characters"
        _require("stop", 1 <= len(text) <= MAX_STOP_CHARS, rule, f"{len(text)} characters")
