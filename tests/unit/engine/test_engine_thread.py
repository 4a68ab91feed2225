"""The engine on its own thread: submitting, backpressure, cancellation, death."""

import functools
import queue
import threading
from pathlib import Path

import pytest
import torch
from dllm_engine import (
    CanvasUpdate,
    EngineDead,
    EngineThread,
    NotStarted,
    Prompt,
    QueueFull,
    SamplingParams,
)

from tests.support.engines import FakeRunner, make_engine


def start(checkpoint: Path, runner: FakeRunner | None = None, **settings: float) -> EngineThread:
    """A thread with an engine of its own."""
    return EngineThread(make_engine(checkpoint, runner, **settings))


def lost(*_: object) -> None:
    """Fail as a lost device does."""
    raise torch.AcceleratorError("device lost")


def test_requests_from_many_threads_are_all_answered(checkpoint: Path) -> None:
    """Sixteen threads over four slots: every request gets exactly one final update."""
    worker = start(checkpoint, max_num_seqs=4)
    answers: queue.Queue[CanvasUpdate] = queue.Queue()

    def ask(length: int) -> None:
        params = SamplingParams(gen_length=length, ignore_eos=True)
        worker.submit(worker.engine.make_request(Prompt([1]), params), answers.put)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 17)]
    for thread in threads:
        thread.start()
    lengths = sorted(len(answers.get(timeout=60).token_ids) for _ in threads)
    assert lengths == list(range(1, 17))
    worker.close()
    assert answers.empty()


def test_request_that_runs_alone(checkpoint: Path) -> None:
    """It begins when all before it are done, and those after it begin when it is done."""
    worker = start(checkpoint, max_num_seqs=3)
    log: queue.Queue[tuple[str, bool]] = queue.Queue()

    def note(name: str, update: CanvasUpdate) -> None:
        if update.usage.steps:  # not the signs of life of one that waits
            log.put((name, update.finished))

    def ask(name: str, *, exclusive: bool = False) -> None:
        params = SamplingParams(gen_length=12, ignore_eos=True)
        request = worker.engine.make_request(
            Prompt([1]), params, stream_interval=0, exclusive=exclusive
        )
        worker.submit(request, functools.partial(note, name))

    for name in ("before", "before too"):
        ask(name)
    ask("alone", exclusive=True)
    for name in ("after", "alone too", "last"):
        ask(name, exclusive=name == "alone too")
    events = [log.get(timeout=60) for _ in range(6 * 12)]
    worker.close()
    names = [name for name, _ in events]
    assert set(names[:24]) == {"before", "before too"}
    assert names[24:] == ["alone"] * 12 + ["after"] * 12 + ["alone too"] * 12 + ["last"] * 12
    assert sum(finished for _, finished in events) == 6


def test_more_than_may_wait_are_refused(checkpoint: Path) -> None:
    """`submit` raises when slots and queue are full, and works again once a request has ended."""
    worker = start(checkpoint, max_num_seqs=1, max_queue_size=1)
    answers: queue.Queue[CanvasUpdate] = queue.Queue()
    params = SamplingParams(gen_length=250, ignore_eos=True)

    def ask() -> int:
        request = worker.engine.make_request(Prompt([1]), params)
        worker.submit(request, answers.put)
        return request.request_id

    running, waiting = ask(), ask()
    with pytest.raises(QueueFull, match=r"maximum queue size of 1 \(DLLM_MAX_QUEUE_SIZE\)"):
        ask()
    worker.cancel(waiting)
    assert answers.get(timeout=30).request_id == waiting
    third = ask()
    for request_id in (running, third):
        worker.cancel(request_id)
    assert {answers.get(timeout=30).request_id for _ in range(2)} == {running, third}
    worker.close()


def test_a_worker_without_work_sleeps(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between requests the engine is not asked for steps again and again."""
    worker = start(checkpoint)
    steps, step = [], worker.engine.step
    monkeypatch.setattr(worker.engine, "step", lambda: steps.append(1) or step())
    answers: queue.Queue[CanvasUpdate] = queue.Queue()
    for _ in range(2):
        params = SamplingParams(gen_length=4, ignore_eos=True)
        worker.submit(worker.engine.make_request(Prompt([1]), params), answers.put)
        answers.get(timeout=30)
        threading.Event().wait(0.2)
    worker.close()
    assert len(steps) <= 2 * 4 + 1  # closing may ask once more


def test_close_finishes_what_runs(checkpoint: Path) -> None:
    """Closing drains: requests already handed over are answered first."""
    worker = start(checkpoint)
    answers: queue.Queue[CanvasUpdate] = queue.Queue()
    for _ in range(5):
        params = SamplingParams(gen_length=8, ignore_eos=True)
        worker.submit(worker.engine.make_request(Prompt([1]), params), answers.put)
    worker.close()
    assert answers.qsize() == 5


def test_close_rejects_waiting_requests_and_takes_cancels(checkpoint: Path) -> None:
    """On `close` requests without a slot fail at once; running ones can still be cancelled."""
    worker = start(checkpoint, max_num_seqs=1)
    answers: queue.Queue[CanvasUpdate] = queue.Queue()
    started = threading.Event()
    params = SamplingParams(gen_length=250, ignore_eos=True)
    requests = [
        worker.engine.make_request(Prompt([1]), params, stream_interval=interval)
        for interval in (0, None, None)
    ]

    def note(update: CanvasUpdate) -> None:
        started.set()
        if update.finished:
            answers.put(update)

    for request in requests:
        worker.submit(request, note)
    assert started.wait(30)
    assert not worker.close(timeout=0.0)
    for _ in requests[1:]:
        error = answers.get(timeout=30).error
        assert isinstance(error, NotStarted)
        assert "stopping" in str(error)
    worker.cancel(requests[0].request_id)
    assert worker.close(timeout=30)
    assert answers.get_nowait().finish_reason is not None


def test_calls_between_steps_run_in_order(checkpoint: Path) -> None:
    """A call that follows a cancel runs once the cancel is done."""
    worker = start(checkpoint)
    log: queue.Queue[str] = queue.Queue()
    request = worker.engine.make_request(
        Prompt([1]), SamplingParams(gen_length=250, ignore_eos=True)
    )
    worker.submit(request, lambda update: log.put(str(update.finish_reason)))
    worker.cancel(request.request_id)
    worker.call_between_steps(lambda: log.put("done"))
    assert [log.get(timeout=30) for _ in range(2)] == ["cancelled", "done"]
    worker.close()


def test_close_gives_a_hanging_engine_up(checkpoint: Path) -> None:
    """Closing waits for a running step no longer than it is told."""
    worker = start(checkpoint, runner := FakeRunner())
    entered, release = threading.Event(), threading.Event()

    def hang(_: object) -> None:
        entered.set()
        release.wait(30)

    runner.on_launch = hang
    answers: queue.Queue[CanvasUpdate] = queue.Queue()
    request = worker.engine.make_request(Prompt([1]), SamplingParams(gen_length=1))
    worker.submit(request, answers.put)
    assert entered.wait(30)
    assert not worker.close(timeout=0.05)
    release.set()
    assert worker.close(timeout=30)
    assert answers.qsize() == 1


def test_a_step_that_does_not_end_is_given_up(checkpoint: Path) -> None:
    """Every request and the owner are told why, once, and `submit` raises; short steps that take
    longer together are no reason."""
    deaths: queue.Queue[EngineDead] = queue.Queue()
    runner = FakeRunner(step_timeout=0.5)
    worker = EngineThread(make_engine(checkpoint, runner, max_num_seqs=1), on_death=deaths.put)
    answers: queue.Queue[CanvasUpdate] = queue.Queue()
    entered, release = threading.Event(), threading.Event()
    delay = 0.05

    def slow(_: object) -> None:
        if not delay:
            entered.set()
            release.wait(60)
        threading.Event().wait(delay)

    runner.on_launch = slow

    def ask() -> None:
        params = SamplingParams(gen_length=20, ignore_eos=True)
        worker.submit(worker.engine.make_request(Prompt([1]), params), answers.put)

    ask()
    assert answers.get(timeout=60).error is None
    delay = 0
    ask()
    assert entered.wait(30)
    ask()
    for _ in range(2):  # one that runs, one that waits
        error = answers.get(timeout=30).error
        assert str(error) == "a step has not ended within 0.5 s (DLLM_STEP_TIMEOUT)"
    assert deaths.get(timeout=30) is error
    with pytest.raises(EngineDead, match="DLLM_STEP_TIMEOUT"):
        ask()
    release.set()
    assert worker.close(timeout=30)
    assert answers.empty()
    assert deaths.empty()


def test_a_cancel_that_waits_for_a_hanging_step_is_given_up(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel waits for the end of a step in flight, which may never come."""
    worker = start(checkpoint, max_num_seqs=1, step_timeout=0.5)
    release = threading.Event()

    def hang(_: int) -> None:
        release.wait(60)

    monkeypatch.setattr(worker.engine, "cancel", hang)
    answers: queue.Queue[CanvasUpdate] = queue.Queue()
    params = SamplingParams(gen_length=250, ignore_eos=True)
    request = worker.engine.make_request(Prompt([1]), params)
    worker.submit(request, answers.put)
    worker.cancel(request.request_id)
    assert "DLLM_STEP_TIMEOUT" in str(answers.get(timeout=30).error)
    release.set()
    assert worker.close(timeout=30)


def test_a_dead_engine_fails_its_requests_and_refuses_new_ones(checkpoint: Path) -> None:
    """On a device error every caller hears of it, the owner is told, and `submit` raises."""
    engine = make_engine(checkpoint, runner := FakeRunner(), max_num_seqs=2)
    deaths: queue.Queue[EngineDead] = queue.Queue()
    worker = EngineThread(engine, on_death=deaths.put)
    runner.on_launch = lost
    answers: queue.Queue[CanvasUpdate] = queue.Queue()
    worker.submit(engine.make_request(Prompt([1]), SamplingParams()), answers.put)
    assert isinstance(answers.get(timeout=30).error, EngineDead)
    assert "device lost" in str(deaths.get(timeout=30))
    with pytest.raises(EngineDead):
        worker.submit(engine.make_request(Prompt([1]), SamplingParams()), answers.put)


def test_requests_that_arrive_as_the_engine_dies_are_answered(checkpoint: Path) -> None:
    """Requests that wait, and those handed over during the last step, fail like those that run."""
    engine = make_engine(checkpoint, runner := FakeRunner(), max_num_seqs=1)
    worker = EngineThread(engine)
    answers: queue.Queue[CanvasUpdate] = queue.Queue()
    entered, release = threading.Event(), threading.Event()

    def lost_after_a_while(_: object) -> None:
        entered.set()
        release.wait(30)
        lost()

    runner.on_launch = lost_after_a_while
    worker.submit(engine.make_request(Prompt([1]), SamplingParams()), answers.put)
    assert entered.wait(30)
    for _ in range(3):
        worker.submit(engine.make_request(Prompt([1]), SamplingParams()), answers.put)
    done = threading.Event()
    worker.call_between_steps(done.set)
    release.set()
    assert done.wait(30)
    assert all(isinstance(answers.get(timeout=30).error, EngineDead) for _ in range(4))
