"""Every cache policy gives each request what its definition gives it alone."""

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import LLM, Prompt, SamplingParams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.budget import examples
from tests.support.cached_reference import PlainModel, generate_cached
from tests.support.cases import (
    IDS,
    RULES,
    SAMPLINGS,
    Case,
    cases,
    is_allowed,
    run_with_arrivals,
)
from tests.support.checkpoints import write_dream, write_llada
from tests.support.log_probs import assert_log_probs
from tests.support.reference import ReferenceResult
from tests.unit.engine.test_parity import NO_SHRINK

POLICIES = ("none", "prefix", "dual", "sparse", "delayed")


#: Both families where all tests run, one for a change.
ONE_FAMILY = pytest.mark.parametrize(
    "family", ["llada", pytest.param("dream", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(scope="module", params=["llada", "dream"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of either family."""
    write = write_llada if request.param == "llada" else write_dream
    return write(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llm64(family: Path) -> LLM:
    """The engine in float64, with small pages, so that sequences take several."""
    return LLM(family, dtype="float64", max_num_batched_tokens=150, max_num_seqs=6, kv_page_size=8)


@pytest.fixture(scope="module")
def plain64(family: Path) -> PlainModel:
    """The same weights, position by position."""
    return PlainModel(family, torch.float64)


def expected(model: PlainModel, prompt: Prompt, params: SamplingParams) -> ReferenceResult:
    """The definition's answer to one request."""
    ids = IDS["dream" if model.shifted else "llada"]
    return generate_cached(model, prompt, params.resolved(), ids)


@settings(
    max_examples=examples(15),
    phases=NO_SHRINK,
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(batch=st.lists(cases(gen_length=14, prompt_length=20, caches=True), min_size=1, max_size=8))
def test_every_policy_equals_its_definition(
    llm64: LLM, plain64: PlainModel, batch: list[Case]
) -> None:
    """Any mix of policies, delays, intervals and ratios, of rules, samplings, guidance, gaps and
    arrivals: identical tokens, from the same steps and with the same log-probabilities."""
    finished = run_with_arrivals(llm64, batch)
    for case, update in zip(batch, finished, strict=True):
        prompt = case.prompt(llm64.engine.spec.mask_token_id)
        reference = expected(plain64, prompt, case.params)
        assert update.token_ids.tolist() == reference.tokens
        tolerance = 1e-5 if case.params.credit else 1e-6
        assert update.confidence.tolist() == pytest.approx(reference.confidence, abs=tolerance)
        assert update.usage.forward_passes == reference.forward_passes
        assert update.reveal_steps.tolist() == reference.reveal_steps
        mask, num_top = llm64.engine.spec.mask_token_id, case.params.logprobs
        assert_log_probs(update, reference.log_probs, mask=mask, num_top=num_top)


def _mixed(count: int, seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests of all policies and several shapes."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        # Of all but one `sparse` keeps everything outside the window.
        torch.randint(0, 499, (4 + 5 * (i % 7) + 40 * (i % 10 == 3),), generator=generator).tolist()
        for i in range(count)
    ]
    params = []
    for i in range(count):
        policy = POLICIES[i % 5]
        given = SamplingParams(
            gen_length=12 + 4 * (i % 3), block_length=8, ignore_eos=True, cache=policy,
            cfg_scale=float(i % 4 == 3),
        )  # fmt: skip
        ratio = 0.4 if policy == "sparse" else None
        params.append(dataclasses.replace(given, retention_ratio=ratio))
    return prompts, params


@ONE_FAMILY
def test_float32_equals_the_definition_too(family: Path) -> None:
    """In float32, on fixed requests of every policy, all in one batch: identical tokens."""
    llm, plain = LLM(family), PlainModel(family, torch.float32)
    prompts, params = _mixed(10, seed=5)
    answers = llm.generate(prompts, params, progress=False)
    for prompt, p, answer in zip(prompts, params, answers, strict=True):
        assert answer.token_ids.tolist() == expected(plain, Prompt(prompt), p).tokens


def _assorted(count: int, seed: int) -> list[Case]:
    """Short requests that go through all rules and policies, every third with guidance and every
    fourth with a gap; the rest of each is drawn."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        rule, policy = RULES[i % len(RULES)], POLICIES[i % len(POLICIES)]
        samplings = [each for each in SAMPLINGS if is_allowed(rule | each)]
        length = draw.randint(4, 8)
        block_length = draw.randint(2, length)
        fields: dict[str, Any] = {}
        if policy != "none":
            fields = {"delay_steps": draw.choice([0, 1]), "refresh_interval": draw.choice([0, 3])}
        if policy == "sparse":
            fields |= {
                "retention_ratio": draw.uniform(0.1, 0.9),
                "pool_kernel": draw.choice([1, 3]),
            }
        params = SamplingParams(
            gen_length=length,
            block_length=block_length,
            steps=draw.randint(-(-length // block_length), length),
            cfg_scale=0.7 if i % 3 == 2 else 0.0,
            seed=draw.getrandbits(40),
            ignore_eos=True,
            cache=policy,
            **rule,
            **draw.choice(samplings),
            **fields,
        )
        short = draw.randint(2, 10)
        more = 40 if policy == "sparse" else 0  # of short ones it keeps all
        ids = [draw.randrange(499) for _ in range(short + more)]
        gap: list[int | None] = [
            draw.choice([None, draw.randrange(499)]) for _ in range(length - 1)
        ]
        suffix = [draw.randrange(499) for _ in range(draw.randint(1, 5))]
        found.append(Case(draw.randint(0, 9), ids, params, *((gap, suffix) if i % 4 == 1 else ())))
    return found


@ONE_FAMILY
def test_float32_equals_the_definition_whatever_is_asked_for(family: Path) -> None:
    """In float32 too: identical tokens for every rule, policy and sampling, with and without
    guidance and gaps, in batches that change from step to step."""
    llm = LLM(family, max_num_batched_tokens=150, max_num_seqs=6, kv_page_size=8)
    plain, batch = PlainModel(family, torch.float32), _assorted(30, seed=3)
    for case, update in zip(batch, run_with_arrivals(llm, batch), strict=True):
        reference = expected(plain, case.prompt(llm.engine.spec.mask_token_id), case.params)
        assert update.token_ids.tolist() == reference.tokens, case
        assert update.usage.forward_passes == reference.forward_passes, case


def test_sparse_keeping_all_equals_dual_and_refreshing_always_equals_none(llm64: LLM) -> None:
    """`sparse` at ratio 1 is `dual`; every policy refreshed at every step is `none`."""
    prompts, _ = _mixed(6, seed=6)
    base = SamplingParams(gen_length=16, block_length=8, ignore_eos=True)

    def tokens(**params: object) -> list[list[int]]:
        asked = dataclasses.replace(base, **params)  # type: ignore[arg-type]
        answers = llm64.generate(prompts, asked, progress=False)
        return [answer.token_ids.tolist() for answer in answers]

    exact = tokens(cache="none")
    assert tokens(cache="sparse", retention_ratio=1.0) == tokens(cache="dual") != exact
    for policy in POLICIES[1:]:
        assert tokens(cache=policy, refresh_interval=1) == exact


@ONE_FAMILY
def test_cached_requests_are_bitwise_the_same_alone_and_in_any_batch(family: Path) -> None:
    """In float32, with all threads: no policy's result depends on its neighbours by a bit."""
    torch.set_num_threads(os.cpu_count() or 1)
    llm = LLM(family)
    prompts, params = _mixed(10, seed=9)
    together = llm.generate(prompts, params, progress=False)
    reversed_order = llm.generate(prompts[::-1], params[::-1], progress=False)[::-1]
    for i in range(len(prompts)):
        alone = llm.generate([prompts[i]], params[i], progress=False)[0]
        for other in (together[i], reversed_order[i]):
            assert alone.token_ids.tolist() == other.token_ids.tolist()
            assert alone.confidence.tobytes() == other.confidence.tobytes()


def test_reuse_computes_its_window_only(llm64: LLM) -> None:
    """Rows pushed through the model: one Refresh per block and the block's rows otherwise."""
    stats = llm64.engine.stats

    def rows(**params: object) -> int:
        before = stats.batched_tokens
        asked = SamplingParams(gen_length=16, block_length=8, ignore_eos=True, **params)  # type: ignore[arg-type]
        llm64.generate([Prompt(list(range(20)))], asked, progress=False)
        return stats.batched_tokens - before

    shifted = llm64.engine.spec.shifted
    assert rows(cache="none") == 16 * 36
    assert rows(cache="dual") == 2 * (36 + 7 * (8 + shifted))
    assert rows(cache="prefix") == 2 * 36 + 7 * (16 + shifted) + 7 * (8 + shifted)
    assert rows(cache="dual", delay_steps=1) == 2 * (2 * 36 + 6 * (8 + shifted))
    # Masks left, and the position committed before: 8, 7 … 2.
    if not shifted:
        assert rows(cache="delayed") == 2 * (36 + sum(range(2, 9)))
