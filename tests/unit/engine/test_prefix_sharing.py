"""Block-wise models: shared beginnings and taken pages change no token."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from dllm_engine import CanvasUpdate, Engine, Prompt, Request, RequestFailed, SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.budget import examples
from tests.support.engines import make_engine, run, runner_of
from tests.support.family_checkpoints import write_family

FAMILIES = ("sdar", "fast_dllm", "nemotron")
#: Tokens that are neither masks nor ends in any of the three.
WORDS = range(10, 90)


def with_pages(engine: Engine, count: int) -> Engine:
    """The same model over a pool of so many pages."""
    engine.runner.plan = dataclasses.replace(engine.runner.plan, num_pages=count)
    return Engine(engine.config, engine.runner)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """An engine of each family, with pages of 8 tokens and prompts in chunks of 32."""
    return {
        family: make_engine(
            write_family(tmp_path_factory.mktemp(family), family),
            kv_page_size=8,
            max_num_seqs=6,
            max_num_batched_tokens=128,
            logits_budget_mb=1,
        )
        for family in FAMILIES
    }


def without_sharing(engine: Engine) -> Engine:
    """The same model, with pages for everything and no prefix cache."""
    engine.runner.plan = dataclasses.replace(engine.runner.plan, num_pages=1000)
    return Engine(dataclasses.replace(engine.config, prefix_cache=False), engine.runner)


def ask(engine: Engine, prompt: list[int], salt: str = "", **params: object) -> CanvasUpdate:
    """Run one request alone."""
    request = engine.make_request(
        Prompt(prompt),
        SamplingParams(**params),  # type: ignore[arg-type]
        cache_salt=salt,
    )
    engine.add(request)
    return run(engine)[request.request_id]


def words(rng: random.Random, count: int) -> list[int]:
    """Random tokens."""
    return rng.choices(WORDS, k=count)


class Talk:
    """Random conversations: each turn repeats, branches off or goes on, and may be sampled."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.said: list[list[int]] = [words(rng, 40)]
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []

    def turn(self) -> tuple[Prompt, SamplingParams]:
        """The next request."""
        rng, before = self.rng, self.rng.choice(self.said)
        if rng.random() < 0.4:
            before = before[: rng.randint(1, len(before))]
        prompt = before[:100] + words(rng, rng.randint(1, 20))
        params = SamplingParams(
            gen_length=rng.choice([4, 16, 40]),
            temperature=rng.choice([0.0, 1.0]),
            confidence_threshold=rng.choice([0.05, 0.5]),
            seed=len(self.prompts),
            ignore_eos=rng.random() < 0.5,
        )
        self.prompts.append(prompt)
        self.params.append(params)
        return Prompt(prompt), params

    def hear(self, number: int, answer: CanvasUpdate) -> None:
        """A finished answer may be continued."""
        self.said.append(self.prompts[number] + answer.token_ids[: answer.num_ready].tolist())


def converse(engine: Engine, talk: Talk, count: int) -> tuple[list[CanvasUpdate], list[Request]]:
    """Submit `count` turns at random steps, and run all; updates and requests in order."""
    requests: list[Request] = []
    found: dict[int, CanvasUpdate] = {}
    while len(found) < count:
        if len(requests) < count and (not engine.has_work or talk.rng.random() < 0.3):
            priority = talk.rng.choice([1, 2, 3])
            request = engine.make_request(*talk.turn(), priority=priority)
            request.exclusive = talk.rng.random() < 0.1
            requests.append(request)
            engine.add(request)
        for update in engine.step():
            assert update.error is None
            number = update.request_id - requests[0].request_id
            found[number] = update
            talk.hear(number, update)
        engine.scheduler.check_integrity()
    assert engine.allocator.num_used == 0
    return [found[number] for number in range(count)], requests


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=examples(6))
@given(seed=st.integers(0, 2**32), num_pages=st.sampled_from([22, 30, 200]))
def test_tokens_are_those_of_a_request_alone(
    engines: dict[str, Engine], family: str, seed: int, num_pages: int
) -> None:
    """Random conversations share, branch, are evicted and preempted, and arrive at random steps:
    tokens are those of each request alone without the cache. Confidences may differ in the last
    bits, since sums over keys are rounded in another order."""
    talk = Talk(random.Random(seed))
    engine = with_pages(engines[family], num_pages)
    answers, _ = converse(engine, talk, 16)
    alone = without_sharing(engines[family])
    for prompt, params, answer in zip(talk.prompts, talk.params, answers, strict=True):
        alone.add(alone.make_request(Prompt(prompt), params))
        (expected,) = run(alone).values()
        assert answer.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(answer.confidence, expected.confidence, rtol=1e-3, atol=1e-5)
        assert answer.finish_reason == expected.finish_reason
        assert answer.num_ready == expected.num_ready


def test_the_conversations_above_share_and_take_pages(engines: dict[str, Engine]) -> None:
    """They reach what they are to test: hits, evictions, preemptions."""
    engine = with_pages(engines["sdar"], 30)
    converse(engine, Talk(random.Random(3)), 60)
    assert engine.stats.prefix_cache_hits > 500
    assert engine.stats.preemptions > 1
    engine = with_pages(engines["sdar"], 200)
    converse(engine, Talk(random.Random(3)), 60)
    assert engine.stats.preemptions == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repeated_prompt_is_not_computed_again(engines: dict[str, Engine], family: str) -> None:
    """Whole pages of it come from the cache, and as many fewer rows go through the model."""
    engine = with_pages(engines[family], 200)
    prompt = words(random.Random(0), 70)
    params = {"gen_length": 8, "ignore_eos": True, "temperature": 0.0}
    first = ask(engine, prompt, **params)
    rows = engine.stats.batched_tokens
    second = ask(engine, prompt, **params)
    cached = second.usage.cached_tokens
    assert first.usage.cached_tokens == 0
    assert cached == {"sdar": 64, "fast_dllm": 64, "nemotron": 64}[family]
    assert engine.stats.batched_tokens - rows == rows - cached
    assert second.token_ids.tolist() == first.token_ids.tolist()
    assert engine.stats.prefix_cache_queries == 140
    assert engine.stats.prefix_cache_hits == cached


def test_an_answer_is_reused_by_the_next_turn(engines: dict[str, Engine]) -> None:
    """What is final of an answer enters the cache too; a conversation's share of it grows."""
    engine = with_pages(engines["sdar"], 200)
    said, cached = words(random.Random(1), 20), []
    for _ in range(4):
        answer = ask(engine, said, gen_length=32, ignore_eos=True)
        cached.append(answer.usage.cached_tokens)
        said = said + answer.token_ids.tolist() + words(random.Random(2), 5)
    assert cached == [0, 48, 88, 120]


def test_nothing_behind_a_stop_string_is_kept(engines: dict[str, Engine]) -> None:
    """The block that holds it is cut: a conversation cannot go on with the rest of it."""
    engine = with_pages(engines["sdar"], 200)
    assert engine.tokenizer is not None
    params = {"gen_length": 64, "ignore_eos": True, "confidence_threshold": 0.01}
    prompt = words(random.Random(4), 8)
    whole = ask(engine, prompt, salt="whole", **params)
    text = engine.tokenizer.decode(whole.token_ids)
    cut = ask(engine, prompt, salt="cut", stop=(text[len(text) // 2 :][:3],), **params)
    assert 0 < cut.num_ready < 64
    again = ask(engine, prompt + whole.token_ids.tolist(), salt="cut", **params)
    assert again.usage.cached_tokens <= len(prompt) + cut.num_ready


def test_a_salt_of_its_own_shares_nothing(engines: dict[str, Engine]) -> None:
    """Neither the count nor the rows computed tell what a request with another salt has sent."""
    engine = with_pages(engines["sdar"], 200)
    prompt = words(random.Random(5), 64)
    seen = {}
    for salt in ("one", "two", "one", ""):
        before = engine.stats.batched_tokens
        answer = ask(engine, prompt, salt=salt, gen_length=4, ignore_eos=True)
        seen[salt] = answer.usage.cached_tokens, engine.stats.batched_tokens - before
    assert seen["two"] == seen[""]
    assert seen["two"][0] == 0
    assert seen["one"][0] == 64
    assert seen["one"][1] < seen["two"][1]


def test_switched_off_nothing_is_kept(engines: dict[str, Engine]) -> None:
    """With `prefix_cache` off, a repeated prompt costs as much as the first time."""
    engine = without_sharing(engines["sdar"])
    for _ in range(2):
        answer = ask(engine, words(random.Random(6), 64), gen_length=4)
        assert answer.usage.cached_tokens == 0
    assert engine.allocator.num_cached == 0
    assert engine.stats.prefix_cache_queries == 0


def test_blocks_of_another_length_are_not_shared(engines: dict[str, Engine]) -> None:
    """Keys and values of a block depend on its length."""
    engine = with_pages(engines["sdar"], 200)
    prompt = words(random.Random(7), 64)
    lengths = (4, 8, 4)
    cached = [
        ask(engine, prompt, gen_length=8, block_length=n).usage.cached_tokens for n in lengths
    ]
    assert cached == [0, 0, 64]


def test_a_failed_request_leaves_nothing_behind(tmp_path: Path) -> None:
    """Keys and values of logits that are not finite do not enter the cache."""
    engine = make_engine(write_family(tmp_path, "sdar", scale=1e38), kv_page_size=8)
    prompt = words(random.Random(8), 4)
    assert ask(engine, prompt, gen_length=16).error is not None
    assert engine.allocator.num_cached == 0
    assert engine.allocator.num_used == 0


def test_what_a_failed_request_had_from_the_cache_is_computed_again(tmp_path: Path) -> None:
    """Damaged keys and values fail one request, and not every later one with that beginning."""
    engine = make_engine(write_family(tmp_path, "sdar"), kv_page_size=8)
    prompt = words(random.Random(9), 64)
    whole = ask(engine, prompt, gen_length=16, ignore_eos=True)
    runner_of(engine).rank.pages.values.fill_(torch.nan)
    answers = [ask(engine, prompt, gen_length=16, ignore_eos=True) for _ in range(3)]
    assert [answer.usage.cached_tokens for answer in answers] == [64, 0, 64]
    assert isinstance(answers[0].error, RequestFailed)
    for answer in answers[1:]:
        assert answer.token_ids.tolist() == whole.token_ids.tolist()
    engine.scheduler.check_integrity()
