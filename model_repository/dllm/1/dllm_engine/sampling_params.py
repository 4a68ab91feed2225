"""How a request is denoised: the table of sampling fields, and their checks. No torch.

`SamplingParams` is the one place where a field is declared: type, default, limits and
description. `make fields` writes the other lists of fields from it (docs/fields.md).
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from dllm_engine.decoding import (
    ALG,
    COMMIT_FIELDS,
    DEFAULT_REMASKING,
    REMASKING,
    REQUIRED_WITH,
    is_given,
)
from dllm_engine.errors import InvalidRequest
from dllm_engine.structured.compiler import check as check_form

#: Of models in which every token sees every other one; and of block-wise models.
CACHE_POLICIES = ("none", "prefix", "dual", "sparse", "delayed")
BLOCK_CACHE_POLICIES = ("none", "block")
#: Parameters of caching, and the policies that each applies to.
CACHE_FIELDS = {
    "cache": (*CACHE_POLICIES, "block"),
    "retention_ratio": ("sparse",),
    "pool_kernel": ("sparse",),
    "delay_steps": CACHE_POLICIES[1:],
    "refresh_interval": CACHE_POLICIES[1:],
}
DEFAULT_BLOCK_LENGTH = 32
#: Most alternatives that a request may list for each token.
MAX_LOGPROBS = 20
#: The largest value of a number without a limit of its own: far beyond sense, well within float32.
LARGEST = 1_000_000
#: The same for whole numbers: arrays and kernels keep them in 32 bits.
LARGEST_INT = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The values that a field may have."""

    ge: int | None = None
    gt: int | None = None
    le: int | None = None
    odd: bool = False
    choices: tuple[str, ...] = ()
    #: Of a list of strings: how many, and how long each may be.
    max_items: int = 0
    max_chars: int = 0

    @property
    def rule(self) -> str:
        """The limits of a number or a choice in words, to follow "must be"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.gt is not None:
            return f"above {self.gt} and at most {self.le}"
        if self.le is not None:
            return f"{'odd, ' if self.odd else ''}{self.ge} to {self.le}"
        return f"at least {self.ge}"

    def check(self, name: str, value: Any) -> None:
        """Raises InvalidRequest, naming the field and the limit, for a value beyond the limits."""
        if self.max_items:
            self._check_strings(name, value)
        elif self.choices:
            _require(name, value in self.choices, self.rule, repr(value))
        else:
            # Each comparison is false for NaN.
            ok = (
                (self.ge is None or value >= self.ge)
                and (self.gt is None or value > self.gt)
                and (self.le is None or value <= self.le)
                and not (self.odd and value % 2 == 0)
            )
            _require(name, ok, self.rule, value)
            most = LARGEST_INT if self.le is None else self.le
            _require(name, value <= most, f"at most {most}", value)

    def _check_strings(self, name: str, strings: tuple[str, ...]) -> None:
        # A string is a sequence of strings, too: each of its characters would end the text.
        _require(name, not isinstance(strings, str), "a tuple of strings", repr(strings))
        rule = f"at most {self.max_items} strings"
        _require(name, len(strings) <= self.max_items, rule, f"{len(strings)} strings")
        for text in strings:
            rule = f"strings of 1 to {self.max_chars} characters"
            ok = 1 <= len(text) <= self.max_chars
            _require(name, ok, rule, f"{len(text)} characters")


def param(default: Any, doc: str, **limits: Any) -> Any:
    """A field of the table: its default, its description for users, and its limits."""
    return dataclasses.field(default=default, metadata={"doc": doc, "limits": Limits(**limits)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one canvas is denoised. Names are the papers' (LLaDA `generate`, Fast-dLLM).

    `resolved` checks every value; nothing is checked at construction.
    """

    # Gumbel-max over logits / temperature.
    temperature: float = param(
        0.0, "0 picks the most probable tokens; above 0 samples", ge=0, le=LARGEST
    )
    gen_length: int = param(32, "length of the canvas in tokens", ge=1)
    steps: int | None = param(
        None, "denoising steps over the whole canvas; default: gen_length", ge=1
    )
    block_length: int | None = param(
        None,
        "tokens per block, at most gen_length; default: 32, with alg gen_length; a block-wise "
        "model's own",
        ge=1,
    )
    # The papers stay below 10. Every model type can multiply a hidden state by the ceiling.
    cfg_scale: float = param(0.0, "classifier-free guidance; 0 is off", ge=0, le=1000)
    remasking: str | None = param(
        None,
        "which positions a step commits first; default: low_confidence, or a block-wise model's "
        "own rule",
        choices=tuple(REMASKING),
    )
    confidence_threshold: float | None = param(
        None, "commit every position at least this confident, and the best", gt=0, le=1
    )
    factor: float | None = param(
        None,
        "Fast-dLLM: commit the n most confident while c_n >= 1 - factor / (n + 1)",
        ge=0,
        le=LARGEST,
    )
    entropy_bound: float | None = param(
        None,
        "EB-sampler: commit the least uncertain while their entropies sum to at most this",
        ge=0,
        le=LARGEST,
    )
    low_threshold: float | None = param(
        None, "dInfer: commit the best of each run of masks, too, if above this", gt=0, le=1
    )
    credit: bool = param(False, "dInfer: trust tokens that stay ahead from step to step")
    anchor_threshold: float | None = param(
        None, "LocalLeap: commit neighbors of positions at least this confident", gt=0, le=1
    )
    neighbor_threshold: float | None = param(
        None, "LocalLeap: how confident a neighbor has to be; default: 0.75", gt=0, le=1
    )
    # The time schedule, with statistics after temperature, top-p and top-k.
    alg: str | None = param(None, "Dream's rule, instead of remasking", choices=tuple(ALG))
    alg_temp: float = param(
        0.0,
        "Dream: above 0, draw positions from softmax(score / alg_temp); needs alg",
        ge=0,
        le=LARGEST,
    )
    # Both apply at a temperature above 0, and to the statistics of `alg`.
    top_p: float | None = param(
        None, "sample from the most probable tokens that reach this sum", gt=0, le=1
    )
    top_k: int | None = param(None, "sample from this many most probable tokens", ge=1)
    seed: int | None = param(
        None,
        "repeats an answer; default: drawn at random and reported",
        ge=-(2**63),
        le=2**63 - 1,
    )
    logits_eos_inf: bool = param(False, "never choose the end-of-text token")
    # Their confidence is 0, and they do not count in the others'. (At temperature > 0 the
    # reference suppresses only end of turn.)
    confidence_eos_eot_inf: bool = param(
        False, "commit end-of-text and end-of-turn tokens after all others"
    )
    stop: tuple[str, ...] = param(
        (), "end the text before the first of these strings", max_items=16, max_chars=256
    )
    structured_outputs: Mapping[str, Any] | None = param(
        None,
        "the form of the text, held by construction: one of json (a schema), regex, choice (a "
        "list of strings), json_object (true); prefix and suffix put fixed text around it",
    )
    ignore_eos: bool = param(False, "decode the whole canvas, even after an end-of-text token")
    # The name is vLLM's; raw log-softmax, whatever the sampling.
    logprobs: int | None = param(
        None,
        "report each token's log-probability at the step that committed it, and this many of the "
        "most probable tokens there; default: off",
        ge=0,
        le=MAX_LOGPROBS,
    )
    reveal_steps: bool = param(False, "report the step that committed each token")
    cache: str | None = param(
        None,
        "which keys and values are kept between steps; block-wise models: none, block",
        choices=(*CACHE_POLICIES, "block"),
    )
    retention_ratio: float | None = param(
        None, "share of the positions outside the block that each KV head keeps", gt=0, le=1
    )
    # Max-pooling over the scores, before the positions are chosen. The papers use 3; the work
    # grows with the width, and a GPU kernel loops over it.
    pool_kernel: int | None = param(
        None, "a position scores as the best of this many around it; odd", ge=1, le=63, odd=True
    )
    delay_steps: int | None = param(
        None, "steps of a block that run in full before one stores keys and values", ge=0
    )
    refresh_interval: int | None = param(
        None, "steps between Refreshes in a block; 0: only at its start", ge=0
    )

    def with_cache_defaults(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The same parameters, with caching fields that are None taken from `defaults`.

        Raises:
            InvalidRequest: a given parameter does not apply to the cache policy.
        """
        given = {name for name in CACHE_FIELDS if getattr(self, name) is not None}
        missing = {name: defaults[name] for name in CACHE_FIELDS if name not in given}
        filled = dataclasses.replace(self, **missing)
        _check_limits(filled, CACHE_FIELDS)
        for name in sorted(given):
            policies = CACHE_FIELDS[name]
            if filled.cache not in policies:
                rule = f"applies to cache {', '.join(policies)}"
                raise InvalidRequest(name, f"{rule}; got cache {filled.cache}")
        return filled

    def resolved(self, *, blockwise: bool = False) -> SamplingParams:
        """The same parameters, checked, with every default that depends on others filled in.

        Args:
            blockwise: for a block-wise model: blocks are counted over prompt and answer, and may be
                longer than the answer. `block_length` must be given.

        Raises:
            InvalidRequest: a value is out of range; names the field and the limit.
        """
        _check_limits(self, FIELDS)
        _check_combination(self)
        if self.block_length is not None and not blockwise:
            ok = self.block_length <= self.gen_length
            _require("block_length", ok, f"1 to gen_length ({self.gen_length})", self.block_length)
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
        return dataclasses.replace(
            self,
            block_length=block_length,
            steps=steps,
            seed=seed,
            remasking=self.remasking or DEFAULT_REMASKING,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One row of the table."""

    name: str
    #: `float`, `int`, `bool`, `str` or `dict` (an object as in JSON); the items' of a list.
    type: type
    is_list: bool
    default: Any
    doc: str
    limits: Limits


def table(params: type[SamplingParams]) -> dict[str, Field]:
    """The fields that a class of parameters declares, by name."""
    rows = {}
    hints = typing.get_type_hints(params)
    for field in dataclasses.fields(params):
        # `float`, `float | None` and `tuple[str, ...]` all name one type of value.
        args = typing.get_args(hints[field.name])
        if any(typing.get_origin(arg) is Mapping for arg in args):
            args = (dict,)
        kinds = [kind for kind in args if isinstance(kind, type)]
        rows[field.name] = Field(
            name=field.name,
            type=kinds[0] if kinds else hints[field.name],
            is_list=typing.get_origin(hints[field.name]) is tuple,
            default=field.default,
            doc=field.metadata["doc"],
            limits=field.metadata["limits"],
        )
    return rows


FIELDS: Mapping[str, Field] = table(SamplingParams)


def _require(field: str, ok: bool, rule: str, value: object) -> None:
    if not ok:
        raise InvalidRequest(field, f"must be {rule}; got {value}")


def _check_limits(params: SamplingParams, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(params, name)
        if value is not None and FIELDS[name].type is not dict:
            FIELDS[name].limits.check(name, value)


def _check_combination(p: SamplingParams) -> None:
    if p.structured_outputs is not None:
        check_form(p.structured_outputs)
        for other, is_set in (
            ("stop", bool(p.stop)),
            ("credit", p.credit),
            ("logits_eos_inf", p.logits_eos_inf),
            ("remasking", p.remasking == "speculative"),
        ):
            if is_set:
                what = "speculative " if other == "remasking" else ""
                problem = f"{what}cannot be combined with structured_outputs"
                raise InvalidRequest(other, problem)
    given = [name for name in COMMIT_FIELDS if getattr(p, name) is not None]
    if len(given) > 1:
        raise InvalidRequest(given[1], f"cannot be combined with {given[0]}")
    for name, needed in REQUIRED_WITH.items():
        if is_given(getattr(p, name)) and getattr(p, needed) is None:
            raise InvalidRequest(name, f"needs {needed}")
    if p.remasking == "low_confidence_dynamic":
        if p.confidence_threshold is None:
            raise InvalidRequest("remasking", "low_confidence_dynamic needs confidence_threshold")
        for name in ("credit", "low_threshold"):
            if is_given(getattr(p, name)):
                problem = "cannot be combined with remasking low_confidence_dynamic"
                raise InvalidRequest(name, problem)
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
    if p.confidence_eos_eot_inf:
        given.append("confidence_eos_eot_inf")
    if given:
        raise InvalidRequest(given[0], "cannot be combined with alg")
