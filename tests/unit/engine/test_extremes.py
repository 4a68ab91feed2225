"""The ends of every range: what is accepted runs like any request, what is not is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from dllm_engine import Engine, InvalidRequest, Prompt, RequestFailed, SamplingParams
from dllm_engine.decoding import REQUIRED_WITH
from dllm_engine.sampling_params import CACHE_FIELDS, FIELDS, LARGEST_INT

from tests.support.engines import make_engine, run, runner_of, submit

NUMBERS = [name for name, field in FIELDS.items() if field.type in (int, float)]
#: What must be set for these to apply.
SETTINGS: Mapping[str, dict[str, object]] = {
    "alg_temp": {"alg": "entropy"},
    "top_p": {"temperature": 1.0},
    "top_k": {"temperature": 1.0},
}
#: A vocabulary's token that no other request uses.
BAD_TOKEN = 487


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    """One engine for all cases."""
    return make_engine(checkpoint)


def settings_of(name: str) -> dict[str, object]:
    """Other fields that a request with this one needs."""
    if name in CACHE_FIELDS:
        return {"cache": CACHE_FIELDS[name][-1]}
    if name in REQUIRED_WITH:
        return {REQUIRED_WITH[name]: 0.5}
    return dict(SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_at_either_end_of_its_range_gives_a_proper_answer(
    engine: Engine, name: str
) -> None:
    """The answer is complete, and every confidence is a probability."""
    limits, integer = FIELDS[name].limits, FIELDS[name].type is int
    ends = {
        "gen_length": (1, 200),
        "steps": (1, 200),
        "block_length": (1, 16),
    }.get(name) or (
        limits.ge if limits.gt is None else (1 if integer else 1e-45),
        LARGEST_INT if limits.le is None else limits.le,
    )
    for value in ends:
        for other in ({}, {"credit": True, "confidence_threshold": 0.9}):
            fields = settings_of(name) | {"gen_length": 16, "ignore_eos": True} | {name: value}
            try:
                request = submit(engine, **(other | fields))
            except InvalidRequest:
                assert other, f"{name} = {value} is within its limits"
                continue
            update = run(engine)[request]
            assert update.error is None
            assert (update.confidence >= 0).all()
            assert (update.confidence <= 1.0001).all()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [2**31, 2**70, 1e39, -(2**70)])
def test_a_number_beyond_sense_is_refused_by_name(engine: Engine, name: str, value: float) -> None:
    """No number is so large that it reaches the arrays and overflows there."""
    if name == "seed":
        value *= 2**33
    with pytest.raises(InvalidRequest, match=f"^{name}: "):
        submit(engine, **(settings_of(name) | {name: value}))


@pytest.mark.parametrize("value", [65, 1_001, 100_000_001, LARGEST_INT])
def test_a_wide_pool_is_refused(engine: Engine, value: int) -> None:
    """The work of `pool_kernel` grows with it, so it ends where it stops to mean anything."""
    with pytest.raises(InvalidRequest, match="^pool_kernel: must be odd, 1 to 63; got"):
        submit(engine, cache="sparse", pool_kernel=value)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "sparse", "delayed"])
@pytest.mark.parametrize(
    "rule", [{}, {"entropy_bound": 0.5}, {"alg": "origin"}, {"temperature": 1.0, "top_p": 0.9}]
)
def test_logits_that_are_no_numbers_fail_their_request_alone(
    checkpoint: Path, poison: float, cache: str, rule: dict[str, object]
) -> None:
    """A request whose logits are NaN fails and says so; others, then and later, do not notice."""
    engine = make_engine(checkpoint)
    fields = {"gen_length": 12, "ignore_eos": True, "cache": cache, "seed": 5} | rule
    request = submit(engine, **fields)
    alone = run(engine)[request]
    assert BAD_TOKEN not in alone.token_ids, "it would spoil this answer, too"
    with torch.inference_mode():
        runner_of(engine).rank.model.embedding[BAD_TOKEN] = poison
    params = SamplingParams(**fields)  # type: ignore[arg-type]
    # Longer than the others: it leaves rows behind their last ones in the pages that they get.
    bad = engine.make_request(Prompt([1, BAD_TOKEN, *[3] * 15]), params)
    engine.add(bad)
    beside = submit(engine, **fields)
    finished = run(engine)
    later = [submit(engine, **fields) for _ in range(2)]  # one gets the failed one's pages
    finished |= run(engine)
    assert isinstance(finished[bad.request_id].error, RequestFailed)
    assert "not finite" in str(finished[bad.request_id].error)
    for other in (beside, *later):
        assert finished[other].token_ids.tolist() == alone.token_ids.tolist()
    assert engine.stats.requests_failed == 1


def test_a_stop_string_in_a_long_canvas_is_found_with_few_decodes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it ends is searched for, not tried token by token: other requests wait meanwhile."""
    engine = make_engine(checkpoint)
    assert engine.tokenizer is not None
    fields = {"gen_length": 240, "block_length": 240, "steps": 1, "temperature": 5.0, "seed": 2}
    fields |= {"ignore_eos": True, "logits_eos_inf": True}
    request = submit(engine, **fields)
    whole = run(engine)[request]
    text = engine.tokenizer.decode(whole.token_ids)
    decode, calls = engine.tokenizer.decode, 0

    def counted(token_ids: np.ndarray) -> str:
        nonlocal calls
        calls += 1
        return decode(token_ids)

    monkeypatch.setattr(engine.tokenizer, "decode", counted)
    request = submit(engine, **fields, stop=(text[100:108],))
    update = run(engine)[request]
    ready = update.token_ids[: update.num_ready]
    assert text[100:108] in decode(ready)
    assert text[100:108] not in decode(ready[:-1])
    assert calls <= 12
