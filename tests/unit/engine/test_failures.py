"""Who hears of it when a request fails, or the device."""

import time
import weakref
from pathlib import Path

import pytest
import torch
from dllm_engine import Engine, EngineDead, Prompt, QueueTimeout, RequestFailed, SamplingParams

from tests.support.checkpoints import MASK
from tests.support.engines import PROMPT, make_engine, run, submit


def test_a_failing_request_harms_no_other(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error inside a step fails the request that causes it; the others get their answers.

    The log has the name that the caller gave it.
    """
    engine = make_engine(checkpoint)
    whole = {i: run_alone(checkpoint, i) for i in (4, 6, 9)}
    ids = {}
    for length in whole:
        params = SamplingParams(gen_length=length, ignore_eos=True)
        request = engine.make_request(Prompt(PROMPT), params, name=f"of {length} tokens")
        engine.add(request)
        ids[length] = request.request_id
    model = engine._runner._model
    forward = model.forward

    def fail_on_six(input_ids: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        lengths = [group.length for group in rest[1].fresh]  # type: ignore[attr-defined]
        if len(PROMPT) + 6 in lengths:
            raise RuntimeError("no memory left for this one")
        return forward(input_ids, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", fail_on_six)
    finished = run(engine)
    assert isinstance(finished[ids[6]].error, RequestFailed)
    assert "no memory left" in str(finished[ids[6]].error)
    for length in (4, 9):
        assert finished[ids[length]].token_ids.tolist() == whole[length]
    assert engine.stats.requests_failed == 1
    assert "request failed request_id=of 6 tokens" in caplog.text


def run_alone(checkpoint: Path, gen_length: int, **settings: object) -> list[int]:
    """Tokens of a request in an engine of its own."""
    engine = make_engine(checkpoint, **settings)
    request = submit(engine, gen_length=gen_length, ignore_eos=True)
    return run(engine)[request].token_ids.tolist()


def break_layouts(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Requests with a canvas of nine tokens meet `error` when it is laid out, half-way."""
    table = engine._runner.table
    fill = table.fill

    def fail_on_nine(slot: int, prompt: Prompt, params: SamplingParams) -> None:
        if params.gen_length == 9:
            table.tokens[slot] = -1
            raise error
        fill(slot, prompt, params)

    monkeypatch.setattr(table, "fill", fail_on_nine)


@pytest.mark.parametrize("during", [False, True], ids=["before a step", "during a step"])
@pytest.mark.parametrize("error", [RuntimeError("no memory left"), MemoryError("no memory left")])
def test_a_request_that_cannot_be_laid_out_fails_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, during: bool
) -> None:
    """It ends with nothing but masks and gives its place back; its neighbour goes on, and whoever
    takes the place after it gets the usual tokens."""
    expected = {i: run_alone(checkpoint, i, cache="dual") for i in (5, 6)}
    engine = make_engine(checkpoint, max_num_seqs=2, cache="dual")
    break_layouts(engine, monkeypatch, error)
    neighbour = submit(engine, gen_length=5, ignore_eos=True)
    launch = engine._runner.launch
    late: list[int] = []

    def joined_by_more(slots: list[int]) -> torch.Tensor:
        report = launch(slots)
        if not late:
            late.extend(submit(engine, gen_length=length, ignore_eos=True) for length in (9, 6))
        return report

    if during:
        monkeypatch.setattr(engine._runner, "launch", joined_by_more)
    else:
        late.extend(submit(engine, gen_length=length, ignore_eos=True) for length in (9, 6))
    broken = [update for update in engine.step() if update.finished]
    bad, good = late
    assert [update.request_id for update in broken] == [bad]
    assert isinstance(broken[0].error, RequestFailed)
    assert "no memory left" in str(broken[0].error)
    assert set(broken[0].token_ids.tolist()) == {MASK}
    engine.scheduler.check_integrity()
    assert engine.num_running + engine.num_waiting == 2
    assert engine.num_used_pages == engine.num_running
    finished = run(engine)
    assert finished[neighbour].token_ids.tolist() == expected[5]
    assert finished[good].token_ids.tolist() == expected[6]
    assert (engine.stats.requests_admitted, engine.stats.requests_failed) == (2, 1)


def test_a_device_lost_while_a_request_is_laid_out_is_the_end(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed before it is still told."""
    engine = make_engine(checkpoint)
    break_layouts(engine, monkeypatch, RuntimeError("no memory left"))
    first = submit(engine, gen_length=9)
    fail = engine._runner.table.fill

    def then_lose(*args: object) -> None:
        monkeypatch.setattr(engine._runner.table, "fill", lost)
        fail(*args)  # type: ignore[arg-type]

    def lost(*_: object) -> None:
        raise torch.AcceleratorError("device lost")

    monkeypatch.setattr(engine._runner.table, "fill", then_lose)
    second = submit(engine, gen_length=4)
    with pytest.raises(EngineDead, match="device lost") as raised:
        engine.step()
    updates = {update.request_id: update.error for update in engine.abandon(raised.value)}
    assert isinstance(updates[first], RequestFailed)
    assert updates[second] is raised.value


def test_a_lost_device_is_the_end(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device error ends the engine; every unfinished request is failed with the reason."""
    engine = make_engine(checkpoint, max_num_seqs=1)
    submit(engine)
    submit(engine)

    def lost(*_: object, **__: object) -> torch.Tensor:
        raise torch.AcceleratorError("device lost")

    monkeypatch.setattr(engine._runner._model, "forward", lost)
    with pytest.raises(EngineDead, match="device lost") as raised:
        engine.step()
    updates = engine.abandon(raised.value)
    assert [u.error for u in updates] == [raised.value] * 2
    assert not engine.has_work


def test_a_lost_device_is_no_request_s_fault(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that meets it says so in words of its own; the device is asked before anybody is
    blamed."""
    engine = make_engine(checkpoint)
    submit(engine)

    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    def lost() -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(engine._runner._model, "forward", broken)
    monkeypatch.setattr(engine._runner, "wait", lost)
    with pytest.raises(EngineDead, match="device error: an illegal memory access"):
        engine.step()


def test_a_failed_step_keeps_no_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its requests are run alone, what it had allocated is free."""
    engine = make_engine(checkpoint)
    requests = [submit(engine, gen_length=length) for length in (1, 2)]
    forward = engine._runner._model.forward
    allocated: list[weakref.ref[torch.Tensor]] = []

    def together_it_fails(*arguments: object, **named: object) -> torch.Tensor:
        if not allocated:
            activations = torch.zeros(8)
            allocated.append(weakref.ref(activations))
            raise RuntimeError("out of memory")
        assert allocated[0]() is None
        return forward(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._runner._model, "forward", together_it_fails)
    finished = run(engine)
    assert [finished[request].error for request in requests] == [None, None]


def test_nothing_finished_is_lost_when_the_device_goes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device lost while failed requests are sorted out: finished ones keep their answers."""
    engine = make_engine(checkpoint)
    first, second = submit(engine, gen_length=1), submit(engine, gen_length=2)
    forward = engine._runner._model.forward

    def lost_for_longer_ones(
        input_ids: torch.Tensor, *rest: object, **named: object
    ) -> torch.Tensor:
        lengths = [group.length for group in rest[1].fresh]  # type: ignore[attr-defined]
        if len(lengths) > 1:
            raise RuntimeError("together it fails")
        if lengths[0] > len(PROMPT) + 1:
            raise torch.AcceleratorError("device lost")
        return forward(input_ids, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._runner._model, "forward", lost_for_longer_ones)
    with pytest.raises(EngineDead) as raised:
        engine.step()
    updates = {u.request_id: u for u in engine.abandon(raised.value)}
    assert updates[first].finish_reason is not None
    assert updates[second].error is raised.value


def test_whoever_waited_too_long_hears_of_it_though_the_device_goes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that was ready before the step in which the device is lost is not lost with it."""
    clock = time.monotonic()
    monkeypatch.setattr("dllm_engine.loop.engine.time.monotonic", lambda: clock)
    engine = make_engine(checkpoint, max_num_seqs=1)
    submit(engine, gen_length=8)
    params = SamplingParams(gen_length=8)
    late = engine.make_request(Prompt(PROMPT), params, timeout=1.0)
    engine.add(late)
    engine.step()
    clock += 2.0

    def lost(*_: object, **__: object) -> torch.Tensor:
        raise torch.AcceleratorError("device lost")

    monkeypatch.setattr(engine._runner._model, "forward", lost)
    with pytest.raises(EngineDead) as raised:
        engine.step()
    updates = {u.request_id: u for u in engine.abandon(raised.value)}
    assert isinstance(updates[late.request_id].error, QueueTimeout)
    assert len(updates) == 2
