"""What happens to requests when one of them fails, or the device is lost."""

import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import Engine, EngineDead, Prompt, QueueTimeout, RequestFailed, SamplingParams

from tests.support.checkpoints import MASK
from tests.support.engines import PROMPT, FakeRunner, make_engine, run, runner_of, submit


def test_a_failing_request_harms_no_other(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error inside a step fails only the request that causes it, and is logged with its name."""
    engine = make_engine(checkpoint, runner := FakeRunner())
    ids = {}
    for length in (4, 6, 9):
        params = SamplingParams(gen_length=length, ignore_eos=True)
        request = engine.make_request(Prompt(PROMPT), params, name=f"of {length} tokens")
        engine.add(request)
        ids[length] = request.request_id

    def fail_on_six(lengths: list[int]) -> None:
        if 6 in lengths:
            raise RuntimeError("no memory left for this one")

    runner.on_launch = fail_on_six
    finished = run(engine)
    assert isinstance(finished[ids[6]].error, RequestFailed)
    assert "no memory left" in str(finished[ids[6]].error)
    for length in (4, 9):
        assert finished[ids[length]].token_ids.tolist() == answer(length)
    assert engine.stats.requests_failed == 1
    assert "request failed request_id=of 6 tokens" in caplog.text


def answer(length: int) -> list[int]:
    """What a `FakeRunner` decodes."""
    return [100 + len(PROMPT) + i for i in range(length)]


def run_alone(checkpoint: Path, gen_length: int, **settings: object) -> list[int]:
    """Tokens of a request in an engine of its own."""
    engine = make_engine(checkpoint, **settings)
    request = submit(engine, gen_length=gen_length, ignore_eos=True)
    return run(engine)[request].token_ids.tolist()


def lost(*_: object) -> None:
    """Fail as a lost device does."""
    raise torch.AcceleratorError("device lost")


def break_layouts(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Requests with a canvas of nine tokens meet `error` when it is laid out, half-way."""
    table = runner_of(engine).table
    fill = table.fill

    def fail_on_nine(
        slot: int, prompt: Prompt, params: SamplingParams, *rest: Any
    ) -> tuple[int, bool]:
        if params.gen_length == 9:
            table.tokens[slot] = -1
            raise error
        return fill(slot, prompt, params, *rest)

    monkeypatch.setattr(table, "fill", fail_on_nine)


@pytest.mark.parametrize("during", [False, True], ids=["before a step", "during a step"])
@pytest.mark.parametrize("error", [RuntimeError("no memory left"), MemoryError("no memory left")])
def test_a_request_that_cannot_be_laid_out_fails_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, during: bool
) -> None:
    """Its update shows only masks, its slot is free again, and the requests beside it and after it
    in that slot get their usual tokens."""
    expected = {i: run_alone(checkpoint, i, cache="dual") for i in (5, 6)}
    engine = make_engine(checkpoint, max_num_seqs=2, cache="dual")
    break_layouts(engine, monkeypatch, error)
    neighbour = submit(engine, gen_length=5, ignore_eos=True)
    launch = engine.runner.launch
    late: list[int] = []

    def joined_by_more(slots: list[int]) -> torch.Tensor:
        report = launch(slots)
        if not late:
            late.extend(submit(engine, gen_length=length, ignore_eos=True) for length in (9, 6))
        return report

    if during:
        monkeypatch.setattr(engine.runner, "launch", joined_by_more)
    else:
        late.extend(submit(engine, gen_length=length, ignore_eos=True) for length in (9, 6))
    broken = [update for update in engine.step() if update.finished]
    bad, good = late
    assert [update.request_id for update in broken] == [bad]
    assert isinstance(broken[0].error, RequestFailed)
    assert "no memory left" in str(broken[0].error)
    assert set(broken[0].token_ids.tolist()) == {MASK}
    engine.scheduler.check_integrity()
    assert len(engine.scheduler.running) + len(engine.scheduler.waiting) == 2
    assert engine.allocator.num_used == len(engine.scheduler.running)
    finished = run(engine)
    assert finished[neighbour].token_ids.tolist() == expected[5]
    assert finished[good].token_ids.tolist() == expected[6]
    assert (engine.stats.requests_admitted, engine.stats.requests_failed) == (2, 1)


def test_a_device_lost_while_a_request_is_laid_out_is_the_end(checkpoint: Path) -> None:
    """The engine dies, and the request that failed before still gets its own error."""
    engine = make_engine(checkpoint, runner := FakeRunner())

    def fail_on_nine(params: SamplingParams) -> None:
        if params.gen_length == 9:
            raise RuntimeError("no memory left")
        lost()

    runner.on_start = fail_on_nine
    first, second = submit(engine, gen_length=9), submit(engine, gen_length=4)
    with pytest.raises(EngineDead, match="device lost") as raised:
        engine.step()
    updates = {update.request_id: update.error for update in engine.abort_all(raised.value)}
    assert isinstance(updates[first], RequestFailed)
    assert updates[second] is raised.value


def test_a_request_that_was_not_laid_out_shows_no_other_s_tokens(checkpoint: Path) -> None:
    """Until its own canvas is set up, a request's updates hold masks, whatever its slot holds."""
    engine = make_engine(checkpoint, runner := FakeRunner(), max_num_seqs=2)
    for _ in range(2):
        submit(engine, gen_length=4)
    run(engine)
    runner.on_start = lost
    for _ in range(2):
        submit(engine, gen_length=4)
    with pytest.raises(EngineDead, match="device lost") as raised:
        engine.step()
    assert len(engine.scheduler.running) == 2
    for update in engine.abort_all(raised.value):
        assert set(update.token_ids.tolist()) == {MASK}
        assert set(update.confidence.tolist()) == {-1.0}


def test_a_lost_device_is_the_end(checkpoint: Path) -> None:
    """A device error ends the engine; every unfinished request is failed with the reason."""
    engine = make_engine(checkpoint, runner := FakeRunner(), max_num_seqs=1)
    submit(engine)
    submit(engine)
    runner.on_launch = lost
    with pytest.raises(EngineDead, match="device lost") as raised:
        engine.step()
    updates = engine.abort_all(raised.value)
    assert [u.error for u in updates] == [raised.value] * 2
    assert not engine.has_work


def test_a_lost_device_is_no_request_s_fault(checkpoint: Path) -> None:
    """An error in a library's own words ends the engine if the device turns out to be lost."""
    engine = make_engine(checkpoint, runner := FakeRunner())
    submit(engine)

    def broken(_: object) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    runner.on_launch, runner.on_wait = broken, lost
    with pytest.raises(EngineDead, match="device error: device lost"):
        engine.step()


def test_a_failed_step_keeps_no_memory(checkpoint: Path) -> None:
    """Before its requests are retried alone, all that a failed step had allocated is freed."""
    engine = make_engine(checkpoint, runner := FakeRunner())
    requests = [submit(engine, gen_length=length) for length in (1, 2)]
    allocated: list[weakref.ref[torch.Tensor]] = []

    def together_it_fails(_: object) -> None:
        if not allocated:
            activations = torch.zeros(8)
            allocated.append(weakref.ref(activations))
            raise RuntimeError("out of memory")
        assert allocated[0]() is None

    runner.on_launch = together_it_fails
    finished = run(engine)
    assert [finished[request].error for request in requests] == [None, None]


def test_nothing_finished_is_lost_when_the_device_goes(checkpoint: Path) -> None:
    """Requests that finished before the device is lost during retries keep their answers."""
    engine = make_engine(checkpoint, runner := FakeRunner())
    first, second = submit(engine, gen_length=1), submit(engine, gen_length=2)

    def lost_for_longer_ones(lengths: list[int]) -> None:
        if len(lengths) > 1:
            raise RuntimeError("together it fails")
        if lengths[0] > 1:
            lost()

    runner.on_launch = lost_for_longer_ones
    with pytest.raises(EngineDead) as raised:
        engine.step()
    updates = {u.request_id: u for u in engine.abort_all(raised.value)}
    assert updates[first].finish_reason is not None
    assert updates[second].error is raised.value


def test_an_expired_timeout_is_reported_though_the_device_is_lost(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates that were ready before the device was lost are still returned."""
    clock = time.monotonic()
    monkeypatch.setattr("dllm_engine.loop.engine.time.monotonic", lambda: clock)
    engine = make_engine(checkpoint, runner := FakeRunner(), max_num_seqs=1)
    submit(engine, gen_length=8)
    params = SamplingParams(gen_length=8)
    late = engine.make_request(Prompt(PROMPT), params, timeout=1.0)
    engine.add(late)
    engine.step()
    clock += 2.0
    runner.on_launch = lost
    with pytest.raises(EngineDead) as raised:
        engine.step()
    updates = {u.request_id: u for u in engine.abort_all(raised.value)}
    assert isinstance(updates[late.request_id].error, QueueTimeout)
    assert len(updates) == 2
