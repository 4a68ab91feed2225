"""The simulator's requests cost what the engine's cost, and time passes as the model says."""

import dataclasses
from pathlib import Path

import pytest
from dllm_engine import LLM, Prompt
from dllm_engine.loop.scheduler import Scheduler
from dllm_engine.sampling_params import CACHE_POLICIES

from benchmarks.scheduling import SYSTEMS, measure
from benchmarks.simulator import Arrival, CostModel, FcfsScheduler, simulate, without_pages
from tests.support.family_checkpoints import write_family


@pytest.mark.parametrize("policy", CACHE_POLICIES)
def test_rows_are_those_of_the_engine(llm: LLM, policy: str) -> None:
    """Five requests of mixed lengths push as many rows through the simulator as the engine."""
    load = [Arrival(0.0, 10 + 7 * i, 9 + 4 * i, 8, policy) for i in range(5)]
    before = llm.engine.stats.batched_tokens
    prompts = [Prompt([1] * one.prompt_length) for one in load]
    llm.generate(prompts, [one.params() for one in load], progress=False)
    rows = llm.engine.stats.batched_tokens - before
    outcome = simulate(Scheduler(8, 512, without_pages()), load, CostModel(0.01, 0.001))
    assert sum(outcome.rows) == rows


def test_rows_of_block_wise_models_are_those_of_the_engine(tmp_path: Path) -> None:
    """Prompts in chunks, blocks, and the pass that makes a block final, which rides in the next
    one's first step."""
    llm = LLM(write_family(tmp_path, "sdar"), max_num_batched_tokens=64, prefix_cache=False)
    load = [Arrival(0.0, 9 + 12 * i, 7 + 4 * i, 4, "block", chunk=16) for i in range(5)]
    prompts = [Prompt([11] * one.prompt_length) for one in load]
    params = [dataclasses.replace(one.params(), remasking="low_confidence") for one in load]
    llm.generate(prompts, params, progress=False)
    outcome = simulate(Scheduler(8, 64, without_pages()), load, CostModel(0.01, 0.001))
    assert sum(outcome.rows) == llm.engine.stats.batched_tokens


@pytest.mark.parametrize("kind", [Scheduler, FcfsScheduler])
def test_latency_of_one_request_is_the_cost_of_its_steps(kind: type[Scheduler]) -> None:
    """Alone: one Refresh of 24 rows and seven Reuses of 8."""
    outcome = simulate(kind(4, 512, without_pages()), [Arrival(5.0, 16, 8)], CostModel(1.0, 0.5))
    assert outcome.latencies == [pytest.approx(8 * 1.0 + 0.5 * (24 + 7 * 8))]


def test_idle_steps_are_counted() -> None:
    """Two requests of 24 rows without a cache, and room for one of them in a step."""
    load = [Arrival(0.0, 16, 8, cache="none")] * 2
    outcome = simulate(FcfsScheduler(4, 40, without_pages()), load, CostModel(1.0, 0.0))
    assert outcome.longest_idle == 8
    assert outcome.latencies == [8.0, 16.0]


def test_a_step_that_keeps_up_has_the_rows_that_arrive_while_it_runs() -> None:
    """Any shorter one falls behind; where a row takes longer than its share, none keeps up."""
    for cost in (CostModel(0.0037, 20.8e-6), CostModel(0.0042, 14e-6, free_rows=200)):
        seconds = cost.sustainable_step(35_700)
        assert cost.seconds(round(35_700 * seconds)) == pytest.approx(seconds, rel=0.01)
        assert cost.seconds(round(35_700 * seconds * 0.9)) > 0.9 * seconds
    assert CostModel(0.0037, 20.8e-6).sustainable_step(50_000) == float("inf")


def test_batches_that_run_to_completion_keep_others_waiting() -> None:
    """A short request behind a long one waits for its end; with the engine it does not."""
    load = [Arrival(0.0, 16, 256), Arrival(0.1, 16, 8)]
    cost = CostModel(0.001, 0.0001)

    def short(run_to_completion: int | None) -> float:
        scheduler = Scheduler(4, 512, without_pages())
        outcome = simulate(scheduler, load, cost, run_to_completion=run_to_completion)
        return outcome.latencies[1]

    assert short(16) > 10 * short(None)


def test_the_cost_model_is_fitted() -> None:
    """From steps that follow it, a few of which were disturbed."""
    steps = [(rows, 0.004 + 3e-5 * rows) for rows in range(100, 2000, 50)]
    disturbed = [(500, 4.0), (900, 2.0)]
    cost = CostModel.fit(steps + disturbed)
    assert cost.base == pytest.approx(0.004, rel=0.1)
    assert cost.per_row == pytest.approx(3e-5, rel=0.1)


def test_static_batches_have_their_longest_canvas() -> None:
    """A short request that shares a static batch with a long one takes as many steps."""
    load = [Arrival(0.0, 16, 256), Arrival(0.0, 16, 8)]
    cost = CostModel(1.0, 0.0)

    def latencies(padded: bool) -> list[float]:
        scheduler = Scheduler(4, 2048, without_pages())
        return simulate(scheduler, load, cost, run_to_completion=16, padded=padded).latencies

    assert latencies(padded=False)[1] < 16
    assert min(latencies(padded=True)) >= 256


def test_orders_stand_side_by_side() -> None:
    """Every order gets through the same load, on a GPU too."""
    found = measure("GPU, assumed", "dual", burst=8, share=0.8, count=10, seeds=1)
    assert found.keys() == SYSTEMS.keys()
    assert all(0 < got["p50"] <= got["p99"] for got in found.values())
