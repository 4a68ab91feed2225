"""Two steps in flight: the host commits one while the device runs the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dllm_engine import (
    LLM,
    Engine,
    EngineConfig,
    FinishReason,
    InvalidConfig,
    Prompt,
    RequestFailed,
    SamplingParams,
)
from dllm_engine.ops.transfer import Upload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.budget import examples
from tests.support.cases import Case, cases, run_with_arrivals
from tests.support.checkpoints import MASK
from tests.support.engines import FakeRunner, make_engine, run, submit


@pytest.fixture(scope="module")
def overlapped(checkpoint: Path) -> LLM:
    """An engine whose requests fall into two halves whenever there are two of them."""
    return LLM(
        checkpoint, dtype="float64", max_num_batched_tokens=512, max_num_seqs=8, overlap_rows=1
    )


def watch(engine: Engine, patch: pytest.MonkeyPatch) -> list[tuple[str, frozenset[int]]]:
    """What is launched and finished, and with which slots, from now on."""
    seen: list[tuple[str, frozenset[int]]] = []
    launch, finish = engine.runner.launch, engine.runner.finish
    slots_of: dict[int, frozenset[int]] = {}

    def noted_launch(slots: list[int]) -> Any:
        seen.append(("launch", frozenset(slots)))
        step = launch(slots)
        slots_of[id(step)] = frozenset(slots)
        return step

    def noted_finish(step: Any) -> Any:
        seen.append(("finish", slots_of[id(step)]))
        return finish(step)

    patch.setattr(engine.runner, "launch", noted_launch)
    patch.setattr(engine.runner, "finish", noted_finish)
    return seen


@settings(
    max_examples=examples(40),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(batch=st.lists(cases(caches=True), min_size=2, max_size=10))
def test_answers_are_those_of_one_step_at_a_time(
    llm64: LLM, overlapped: LLM, batch: list[Case]
) -> None:
    """Any mix of rules, policies, guidance, lengths and arrivals: tokens and passes."""
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(overlapped.engine, patch)
        found = run_with_arrivals(overlapped, batch)
    in_flight: list[frozenset[int]] = []
    for what, slots in seen:
        if what == "launch":
            assert not any(slots & others for others in in_flight)
            in_flight.append(slots)
            assert len(in_flight) <= 2
        else:
            in_flight.remove(slots)
    for expected, update in zip(run_with_arrivals(llm64, batch), found, strict=True):
        assert update.token_ids.tolist() == expected.token_ids.tolist()
        assert update.usage == expected.usage


def test_each_step_is_launched_before_the_one_before_it_ends(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four equal requests go in two halves, which take turns."""
    engine = make_engine(checkpoint, overlap_rows=4, max_num_seqs=4)
    seen = watch(engine, monkeypatch)
    for _ in range(4):
        submit(engine, gen_length=3, ignore_eos=True)
    run(engine)
    first, second = seen[0][1], seen[1][1]
    assert len(first) == len(second) == 2
    launches = [("launch", half) for half in (first, second)] * 3
    finishes = [("finish", half) for half in (first, second)] * 3
    woven = [pair for both in zip(launches[1:], finishes, strict=False) for pair in both]
    assert seen == [launches[0], *woven, finishes[-1]]


def test_too_few_rows_for_two_steps_make_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does an engine whose overlap is off, as it is by default on a CPU."""
    for overlap_rows in (7, 0, None):
        engine = make_engine(checkpoint, overlap_rows=overlap_rows, max_num_seqs=4)
        seen = watch(engine, monkeypatch)
        for _ in range(2):  # 2 × 6 rows
            submit(engine, gen_length=3, ignore_eos=True)
        run(engine)
        assert [what for what, _ in seen] == ["launch", "finish"] * 3


def test_a_request_is_cancelled_while_it_is_in_flight(checkpoint: Path) -> None:
    """Its slot is reused only when its step has ended, so the next request's answer is its own."""
    alone = make_engine(checkpoint)
    submit(alone, gen_length=9, ignore_eos=True, seed=5)
    (expected,) = run(alone).values()
    engine = make_engine(checkpoint, overlap_rows=1, max_num_seqs=2)
    victims = [submit(engine, gen_length=6, ignore_eos=True) for _ in range(2)]
    heir = submit(engine, gen_length=9, ignore_eos=True, seed=5)
    engine.step()
    assert len(engine.scheduler.running) == 2
    in_flight = [r.request_id for r in engine.scheduler.running if r.in_flight]
    assert len(in_flight) == 1
    cancelled = engine.cancel(in_flight[0])
    assert cancelled is not None
    assert cancelled.finish_reason is FinishReason.CANCELLED
    assert cancelled.usage.steps == 1  # the one that was in flight counts
    finished = run(engine)
    assert finished[heir].token_ids.tolist() == expected.token_ids.tolist()
    assert set(finished) == {heir, *victims} - {in_flight[0]}
    engine.scheduler.check_integrity()


def test_a_request_that_ends_as_it_is_cancelled_is_answered_once(checkpoint: Path) -> None:
    """A cancel that waits for the request's last step changes nothing; its update still follows."""
    engine = make_engine(checkpoint, overlap_rows=1, max_num_seqs=2)
    ids = [submit(engine, gen_length=1, ignore_eos=True) for _ in range(2)]
    (first,) = engine.step()
    (other,) = set(ids) - {first.request_id}
    assert engine.cancel(other) is None
    assert engine.has_work
    (last,) = engine.step()
    assert (last.request_id, last.finish_reason) == (other, FinishReason.LENGTH)
    assert not engine.has_work


def test_no_update_follows_the_cancel_of_a_streaming_request(checkpoint: Path) -> None:
    """One left by the step that a cancel waits for would reach nobody, and end the engine."""
    engine = make_engine(checkpoint, FakeRunner(overlap_rows=1), max_num_seqs=2)
    for _ in range(2):
        params = SamplingParams(gen_length=6)
        engine.add(engine.make_request(Prompt([1, 2, 3]), params, stream_interval=0))
    engine.step()
    (in_flight,) = (r.request_id for r in engine.scheduler.running if r.in_flight)
    cancelled = engine.cancel(in_flight)
    assert cancelled is not None
    assert in_flight not in {update.request_id for update in engine.step()}


def test_a_step_that_fails_beside_another_concerns_nobody_else(checkpoint: Path) -> None:
    """Only the request that cannot be run fails; the step in flight ends as usual."""
    engine = make_engine(checkpoint, runner := FakeRunner(overlap_rows=1), max_num_seqs=4)

    def fail_on_six(lengths: list[int]) -> None:
        if 6 in lengths:
            raise RuntimeError("no memory left for this one")

    runner.on_launch = fail_on_six
    ids = [submit(engine, gen_length=4 + i, ignore_eos=True, seed=i) for i in range(4)]
    finished = run(engine)
    assert isinstance(finished[ids[2]].error, RequestFailed)
    for i in (0, 1, 3):
        assert finished[ids[i]].finish_reason is FinishReason.LENGTH
        assert MASK not in finished[ids[i]].token_ids.tolist()


def test_the_setting_is_refused_where_it_means_nothing() -> None:
    """Ranks take one step at a time."""
    with pytest.raises(InvalidConfig, match=r"^DLLM_OVERLAP_ROWS: .*DLLM_TENSOR_PARALLEL_SIZE"):
        EngineConfig(model_path=Path(), overlap_rows=64, tensor_parallel_size=2)
    with pytest.raises(InvalidConfig, match="^DLLM_OVERLAP_ROWS: must be at least 0"):
        EngineConfig(model_path=Path(), overlap_rows=-1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([np.int64, np.float64, np.bool_, np.float32]),
            st.lists(st.integers(0, 9), min_size=1, max_size=3),
        ),
        max_size=12,
    )
)
def test_an_upload_holds_what_was_put_into_it(arrays: list[tuple[type, list[int]]]) -> None:
    """Arrays of any types and shapes, strided ones too, side by side and aligned."""
    upload = Upload("cpu", staged=True)
    sources = [np.arange(max(1, 2 * np.prod(shape)))[::2][: int(np.prod(shape))].astype(dtype)
               .reshape(shape) for dtype, shape in arrays]  # fmt: skip
    sent = [upload(source) for source in sources]
    upload.send()
    for source, tensor in zip(sources, sent, strict=True):
        assert tensor.numpy().tolist() == source.tolist()
        assert tensor.numpy().dtype == source.dtype
    assert len({tensor.data_ptr() % 16 for tensor in sent if tensor.numel()}) <= 1


def test_what_does_not_fit_into_an_upload_goes_by_itself() -> None:
    """Before, behind and between what fits."""
    upload = Upload("cpu", staged=True)
    sources = [np.full(n, n) for n in (3, 2**18, 5, 2**18 - 200, 7)]
    sent = [upload(source) for source in sources]
    upload.send()
    for source, tensor in zip(sources, sent, strict=True):
        assert torch.equal(tensor, torch.from_numpy(source))


def test_prompts_can_be_given_while_two_steps_are_in_flight(checkpoint: Path) -> None:
    """New requests are set up in free slots without touching those in flight."""
    engine = make_engine(checkpoint, overlap_rows=1, max_num_seqs=4, dtype="float64")
    plain = LLM(checkpoint, dtype="float64")
    prompts = [Prompt([5 + i, 6, 7]) for i in range(9)]
    params = SamplingParams(gen_length=7, block_length=4, cache="delayed", ignore_eos=True, seed=1)
    expected = plain.generate(prompts, params, progress=False)
    requests, finished = [], {}
    for prompt in prompts:
        requests.append(engine.make_request(prompt, params))
        engine.add(requests[-1])
        finished |= {u.request_id: u for u in engine.step() if u.finished}
    finished |= run(engine)
    for request, answer in zip(requests, expected, strict=True):
        assert finished[request.request_id].token_ids.tolist() == answer.token_ids.tolist()
