"""Random requests of every kind for property tests, and the plain loops' answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dllm_engine import LLM, CanvasUpdate, Prompt, SamplingParams
from hypothesis import assume
from hypothesis import strategies as st

from .checkpoints import DREAM_MASK, DREAM_SPECIALS, EOS, EOT, MASK
from .decoder import Ids

VOCABULARY = 512
#: Special tokens of the tiny checkpoints of both families.
IDS = {
    "llada": Ids(MASK, (EOS,), (EOS, EOT)),
    "dream": Ids(
        DREAM_MASK,
        (DREAM_SPECIALS["<|endoftext|>"],),
        (DREAM_SPECIALS["<|endoftext|>"], DREAM_SPECIALS["<|im_end|>"]),
    ),
}

#: Every rule, with thresholds that a random model sometimes reaches.
RULES: tuple[Mapping[str, Any], ...] = (
    {},
    {"remasking": "entropy"},
    {"remasking": "margin"},
    {"remasking": "random"},
    {"remasking": "sequential"},
    {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.05},
    {"confidence_threshold": 0.05},
    {"confidence_threshold": 0.2},
    {"confidence_threshold": 0.3, "low_threshold": 0.05},
    {"confidence_threshold": 0.1, "credit": True},
    {"factor": 1.0},
    {"factor": 2.5},
    {"entropy_bound": 0.5},
    {"entropy_bound": 6.0},
    {"anchor_threshold": 0.2, "neighbor_threshold": 0.05},
    {"anchor_threshold": 0.2, "neighbor_threshold": 0.05, "remasking": "random"},
    {"anchor_threshold": 0.1, "remasking": "entropy"},
    {"alg": "origin"},
    {"alg": "maskgit_plus"},
    {"alg": "topk_margin"},
    {"alg": "entropy"},
    {"alg": "maskgit_plus", "alg_temp": 0.3},
    {"alg": "entropy", "alg_temp": 0.7},
)
#: Sampling parameters. With `alg`, filters also apply at temperature 0.
SAMPLINGS: tuple[Mapping[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 7},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 12},
    {"top_p": 0.7, "top_k": 30},
)
ENDS: tuple[Mapping[str, Any], ...] = (
    {"ignore_eos": True},
    {},
    {"ignore_eos": True, "logits_eos_inf": True},
    {"confidence_eos_eot_inf": True},
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One request and the step at which it arrives."""

    arrival: int
    ids: list[int]
    params: SamplingParams
    #: Tokens of the canvas from its left, None if masked; the rest is masked.
    fixed: list[int | None] = dataclasses.field(default_factory=list)
    suffix: list[int] = dataclasses.field(default_factory=list)

    def prompt(self, mask: int) -> Prompt:
        """The prompt for a model with this mask token."""
        missing = self.params.gen_length - len(self.fixed)
        canvas = [mask if t is None else t for t in self.fixed] + [mask] * missing
        return Prompt(self.ids, canvas if self.fixed else [], self.suffix)


def is_allowed(choice: Mapping[str, Any]) -> bool:
    """Whether a request may combine these."""
    late = "confidence_eos_eot_inf" in choice
    if "credit" in choice:
        return "temperature" not in choice and not late  # the engine refuses it: see test_engine
    return not ("alg" in choice and late)


@st.composite
def cases(
    draw: st.DrawFn, *, gen_length: int = 28, prompt_length: int = 50, caches: bool = False
) -> Case:
    """Any rule, sampling, guidance, schedule, end and gap; with `caches`, any policy too."""
    choice: dict[str, Any] = {}
    for kind in (RULES, SAMPLINGS, ENDS):
        choice |= draw(st.sampled_from(kind))
    assume(is_allowed(choice))
    length = draw(st.integers(1, gen_length))
    # A list of credit holds 16 tokens: a block of more steps may need more (see test_credit).
    block_length = draw(st.integers(1, min(length, 16) if "credit" in choice else length))
    params = SamplingParams(
        gen_length=length,
        block_length=block_length,
        steps=draw(st.integers(-(-length // block_length), length + 3)),
        cfg_scale=draw(st.sampled_from([0.0, 0.0, 0.7, 2.5])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        logprobs=draw(st.sampled_from([None, 0, 3])),
        **choice,
        **(draw(cache_fields()) if caches else {}),
    )
    if params.cache == "sparse":
        prompt_length += 32  # of a shorter prompt everything is kept
    token = st.integers(0, VOCABULARY - 1)
    # After masks only, all positions have the same logits and rounding alone would order them:
    # so the first token is no mask.
    ids = [draw(st.integers(0, 499)), *draw(st.lists(token, max_size=prompt_length - 1))]
    if draw(st.integers(0, 3)):
        return Case(draw(st.integers(0, 30)), ids, params)
    fixed = draw(st.lists(st.none() | st.integers(0, 499), max_size=length - 1))
    return Case(draw(st.integers(0, 30)), ids, params, fixed, draw(st.lists(token, max_size=8)))


@st.composite
def cache_fields(draw: st.DrawFn) -> dict[str, Any]:
    """A policy and its parameters."""
    policy = draw(st.sampled_from(("none", "prefix", "dual", "sparse", "delayed")))
    fields: dict[str, Any] = {"cache": policy}
    if policy != "none":
        fields["delay_steps"] = draw(st.integers(0, 2))
        fields["refresh_interval"] = draw(st.sampled_from([0, 0, 1, 3]))
    if policy == "sparse":
        fields["retention_ratio"] = draw(st.floats(0.05, 1.0))
        fields["pool_kernel"] = draw(st.sampled_from([1, 3, 5]))
    return fields


def run_with_arrivals(llm: LLM, batch: list[Case]) -> list[CanvasUpdate]:
    """Add each request at its step; returns the final update of each."""
    engine = llm.engine
    mask = engine.spec.mask_token_id
    requests = [engine.make_request(case.prompt(mask), case.params) for case in batch]
    finished: dict[int, CanvasUpdate] = {}
    step = 0
    while len(finished) < len(batch):
        for request, case in zip(requests, batch, strict=True):
            if case.arrival == step:
                engine.add(request)
        finished |= {update.request_id: update for update in engine.step()}
        step += 1
    return [finished[request.request_id] for request in requests]
