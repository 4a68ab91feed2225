"""The memory plan, pages, and what happens when there are few of them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from dllm_engine import (
    LLM,
    Engine,
    EngineConfig,
    FinishReason,
    InvalidConfig,
    InvalidRequest,
    Prompt,
)
from dllm_engine import SamplingParams as Params
from dllm_engine.memory.cache_policy import CachePolicy, kept_rows, reserved_rows
from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.memory.plan import PeakMeter, parse_limit
from dllm_engine.models.loader import read_spec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.checkpoints import write_llada
from tests.support.engines import runner_of

MIB = 2**20
PROMPT = [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0.9", 900),
        ("1", 1000),
        ("6000000000", 6_000_000_000),
        ("2KiB", 2048),
        ("1.5 MB", 1.5 * MIB),
        ("3g", 3 * 2**30),
    ],
)
def test_a_limit_is_a_size_or_a_fraction(text: str, size: float) -> None:
    """Of 1,000 bytes that are to be had."""
    assert parse_limit(text, 1000) == size


@pytest.mark.parametrize("text", ["much", "-1", "90%", "6 apples"])
def test_other_limits_are_refused_by_name(text: str) -> None:
    """The message names the setting and shows what it may be."""
    with pytest.raises(InvalidConfig, match=r"DLLM_MEMORY_LIMIT: .*6GiB.*0\.9"):
        parse_limit(text, 1000)


def test_the_plan_adds_up_and_is_kept(checkpoint: Path) -> None:
    """All uses together stay within the limit; each is as asked."""
    engine = Engine(
        EngineConfig(model_path=checkpoint, memory_limit="40MiB", logits_budget_mb=4, cache="dual")
    )
    plan = engine.runner.plan
    assert plan.limit == 40 * MIB
    assert plan.logits == 4 * MIB
    spec = read_spec(checkpoint)
    assert plan.weights == 4 * spec.weight_bytes(1)
    assert plan.requests == runner_of(engine).table.num_bytes > 0
    used = plan.weights + plan.requests + plan.activations + plan.logits + plan.pages
    assert used <= plan.limit
    assert plan.page == 32 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4
    assert "pages of 32 tokens" in str(plan)


@pytest.mark.parametrize("limit", ["100KiB", "1MiB", "4MiB"])
def test_a_model_that_does_not_fit_is_refused(checkpoint: Path, limit: str) -> None:
    """Before loading if the weights alone are too large, else after the profiling run."""
    config = EngineConfig(
        model_path=checkpoint, memory_limit=limit, logits_budget_mb=4, cache="dual"
    )
    with pytest.raises(InvalidConfig, match=r"^DLLM_MEMORY_LIMIT: .*(DLLM_DTYPE|NUM_BATCHED)"):
        Engine(config)


def test_a_table_of_requests_that_does_not_fit_is_refused(checkpoint: Path) -> None:
    """With what it takes and the settings to change; credit is by block, so a shorter longest
    canvas helps as much as fewer requests."""
    settings = {"memory_limit": "32MiB", "logits_budget_mb": 1, "max_num_batched_tokens": 64}
    config = EngineConfig(model_path=checkpoint, max_num_seqs=2048, **settings)  # type: ignore[arg-type]
    with pytest.raises(
        InvalidConfig, match=r"requests 7\d\.\d+ MiB.*DLLM_MAX_NUM_SEQS .*MODEL_LEN"
    ):
        Engine(config)
    shorter = dataclasses.replace(config, max_gen_length=16)
    for fits in (dataclasses.replace(config, max_num_seqs=64), shorter):
        assert Engine(fits).runner.plan.requests < 24 * MIB


def test_nothing_is_added_to_the_table_of_requests_while_they_run(checkpoint: Path) -> None:
    """Not by the first request with credit, nor by one as long as may be."""
    engine = Engine(EngineConfig(model_path=checkpoint, max_num_seqs=4))
    for length in (8, 250):
        params = Params(gen_length=length, confidence_threshold=0.9, credit=True)
        engine.add(engine.make_request(Prompt([1, 2, 3]), params))
        engine.step()
    assert runner_of(engine).table.num_bytes == engine.runner.plan.requests


def test_a_peak_is_measured() -> None:
    """A tensor of 64 MiB that lives for a moment is seen."""
    with PeakMeter("cpu") as meter:
        torch.ones(16 * MIB)
    assert 60 * MIB <= meter.peak <= 80 * MIB


def _with_pages(engine: Engine, pages: int) -> Engine:
    """The same engine with this many pages."""
    engine.runner.plan = dataclasses.replace(engine.runner.plan, num_pages=pages)
    return Engine(engine.config, engine.runner)


def _few_pages(checkpoint: Path, pages: int) -> LLM:
    """An engine with this many pages of 8 tokens."""
    free = LLM(checkpoint, kv_page_size=8, logits_budget_mb=1)
    free.engine = _with_pages(free.engine, pages)
    return free


def test_requests_wait_for_pages_and_none_is_lost(checkpoint: Path) -> None:
    """Twelve requests of five pages over eleven: two run at once, all get their usual tokens."""
    llm = _few_pages(checkpoint, 11)
    prompts = [[i + 1] * 20 for i in range(12)]
    params = Params(gen_length=16, block_length=8, ignore_eos=True, cache="dual")
    for prompt in prompts:
        llm.engine.add(llm.engine.make_request(Prompt(prompt), params))
    most = 0
    while llm.engine.has_work:
        llm.engine.step()
        most = max(most, len(llm.engine.scheduler.running))
        llm.engine.scheduler.check_integrity()
    assert most == 2
    assert llm.engine.allocator.num_used == 0
    plenty = LLM(checkpoint).generate(prompts, params, progress=False)
    scarce = llm.generate(prompts, params, progress=False)
    assert [a.token_ids.tolist() for a in plenty] == [a.token_ids.tolist() for a in scarce]


def test_cancelling_gives_the_pages_back(checkpoint: Path) -> None:
    """A running request that is cancelled leaves no page behind."""
    engine = LLM(checkpoint).engine
    request = engine.make_request(Prompt([1] * 20), Params(cache="sparse", cfg_scale=1.0))
    engine.add(request)
    engine.step()
    assert engine.allocator.num_used == request.num_pages > 0
    engine.cancel(request.request_id)
    assert engine.allocator.num_used == 0


def _ending_early(directory: Path, params: Params, by: str) -> Params:
    """Write a checkpoint to `directory` on which a request for `PROMPT` ends in its second block,
    by an end-of-text token or by a stop string; its parameters."""
    write_llada(directory)
    free = dataclasses.replace(params, ignore_eos=True)
    llm = LLM(directory)
    answer = llm.generate([PROMPT], free, progress=False)[0]
    if by == "stop":
        assert llm.engine.tokenizer is not None
        return dataclasses.replace(free, stop=(llm.engine.tokenizer.decode(answer.token_ids[4:8]),))
    config = json.loads((directory / "config.json").read_text())
    config["eos_token_id"] = int(answer.token_ids[6])
    (directory / "config.json").write_text(json.dumps(config))
    return params


@pytest.mark.parametrize("cache", ["prefix", "dual", "sparse", "delayed"])
@pytest.mark.parametrize("by", ["end of text", "stop"])
def test_an_early_end_gives_the_pages_back_in_its_own_step(
    tmp_path: Path, cache: str, by: str
) -> None:
    """With pages for no more than one request, the next one begins in the step after."""
    params = Params(gen_length=16, block_length=4, confidence_threshold=0.5, cache=cache)
    params = _ending_early(tmp_path, params, by)
    engine = LLM(tmp_path, kv_page_size=8, max_num_seqs=1).engine
    needed = engine.make_request(Prompt(PROMPT), params).num_pages
    engine = _with_pages(engine, needed)
    first, second = (engine.make_request(Prompt(PROMPT), params) for _ in range(2))
    engine.add(first)
    engine.add(second)
    while not (updates := engine.step()):
        assert engine.allocator.num_used == first.num_pages > 0
    assert [(u.request_id, u.finish_reason) for u in updates] == [
        (first.request_id, FinishReason.STOP)
    ]
    assert updates[0].num_ready < params.gen_length
    assert engine.allocator.num_used == 0
    engine.scheduler.check_integrity()
    engine.step()
    assert (second.steps_run, engine.allocator.num_used) == (1, second.num_pages)
    engine.scheduler.check_integrity()


def test_a_request_that_can_never_fit_is_refused(checkpoint: Path) -> None:
    """With what it needs and what there is; `none` needs no pages."""
    llm = _few_pages(checkpoint, 4)
    with pytest.raises(InvalidRequest, match=r"^cache: dual needs 5 pages .* the server has 4"):
        llm.engine.make_request(Prompt([1] * 20), Params(gen_length=16, cache="dual"))
    assert llm.engine.make_request(Prompt([1] * 20), Params(gen_length=16)).num_pages == 0


@pytest.mark.parametrize("pages", [6, 10, 1000])
@pytest.mark.parametrize("fields", [{}, {"cfg_scale": 1.0}, {"cache": "sparse"}])
def test_headroom_is_how_much_longer_a_prompt_may_be(
    checkpoint: Path, fields: dict[str, float | str], pages: int
) -> None:
    """A prompt longer by the headroom is accepted, one more token is refused."""
    engine = _few_pages(checkpoint, pages).engine
    params = Params(**({"gen_length": 8, "cache": "dual"} | fields))  # type: ignore[arg-type]
    headroom = engine.headroom(engine.make_request(Prompt([1] * 5), params))
    assert engine.headroom(engine.make_request(Prompt([1] * (5 + headroom)), params)) == 0
    with pytest.raises(InvalidRequest, match="^(cache|gen_length): "):
        engine.make_request(Prompt([1] * (6 + headroom)), params)


@given(
    length=st.integers(2, 300),
    window=st.integers(1, 64),
    ratio=st.floats(0.01, 1.0),
)
def test_sparse_reserves_for_its_widest_step(length: int, window: int, ratio: float) -> None:
    """No narrower window (a shorter last block) ever needs more rows than were reserved."""
    window = min(window, length)
    reserved = reserved_rows(CachePolicy.SPARSE, length, window, ratio)
    for narrower in range(1, window + 1):
        assert kept_rows(length - narrower, ratio) + narrower <= reserved


class Pages(RuleBasedStateMachine):
    """Any order of reservations and releases: every page is free or held, once."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(20, 16)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 20))
    def reserve(self, count: int) -> None:
        """As many as asked, if free."""
        if count <= self.allocator.num_free:
            pages = self.allocator.reserve(count)
            assert len(pages) == count
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(place=st.integers(0, 100))
    def release(self, place: int) -> None:
        """Any of them."""
        self.allocator.release(self.held.pop(place % len(self.held)))

    @invariant()
    def nothing_is_lost(self) -> None:
        """Free and held are all pages."""
        self.allocator.check_integrity([page for pages in self.held for page in pages])


TestPages = Pages.TestCase
