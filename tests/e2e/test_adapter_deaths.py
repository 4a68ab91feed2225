"""Processes are killed, and no job is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests

from launcher.tritonserver import TritonServer
from tests.conftest import StartAdapter
from tests.support.repositories import changed_repository, hang
from tests.support.servers import (
    AdapterServer,
    eventually,
    kept_running,
    stub_of,
    triton_server,
)

#: Death is noticed within seconds, with margins for a slow machine.
QUICK = {
    "DLLM_LEASE_SECONDS": "3",
    "DLLM_PROBE_INTERVAL": "0.5",
    "DLLM_STREAM_INTERVAL": "0.5",
    "DLLM_ENGINE_IDLE_TIMEOUT": "20",
}
#: Sampled without a seed: a job that ran twice would not have the same text again.
UNIQUE = {"temperature": 1.0, "gen_length": 64, "ignore_eos": True}


def some_finished(adapter: AdapterServer, jobs: list[int]) -> dict[int, str]:
    """Wait until some jobs are done but not all; the texts of those that are."""

    def texts() -> dict[int, str]:
        bodies = [adapter.result(job) for job in jobs]
        return {
            job: str(body["text"])
            for job, body in zip(jobs, bodies, strict=True)
            if body["status"] == "finished"
        }

    eventually(lambda: bool(texts()), "the first jobs are done")
    done = texts()
    assert len(done) < len(jobs), "too late: all jobs were done"
    return done


def test_killed_worker(start_adapter: StartAdapter) -> None:
    """kill -9 of a worker: another takes up its jobs, and all of them finish."""
    adapter = start_adapter(workers=2, DLLM_MAX_INFLIGHT="4", **QUICK)
    jobs = adapter.submit_batch([f"prompt {i}" for i in range(40)], **UNIQUE)
    early = some_finished(adapter, jobs)
    victim = adapter.worker_processes()[0]
    victim.kill()
    victim.wait(30)

    def status_of_all() -> bool:
        try:
            return adapter.statuses(jobs) == ["finished"] * len(jobs)
        except OSError:  # the connection went to the worker that is no more
            return False

    eventually(status_of_all, "all jobs are finished")
    assert {job: adapter.result(job)["text"] for job in early} == early


@pytest.mark.slow
def test_killed_adapter(start_adapter: StartAdapter) -> None:
    """kill -9 of all workers: the next start finishes every job, and none that was done anew."""
    adapter = start_adapter(workers=2, DLLM_MAX_INFLIGHT="4", **QUICK)
    jobs = adapter.submit_batch([f"prompt {i}" for i in range(40)], **UNIQUE)
    early = some_finished(adapter, jobs)
    adapter.kill()
    assert adapter.health() == 0
    adapter.start()
    texts = {job: adapter.finished(job) for job in jobs}
    assert {job: texts[job] for job in early} == early
    assert len(set(texts.values())) == len(jobs)
    assert adapter.submit("next") == len(jobs)


def test_killed_engine(start_adapter: StartAdapter, undying: TritonServer) -> None:
    """kill -9 of the engine: health is 503 until the server is back, and no job is lost.

    An open stream ends with an error within 2 s.
    """
    adapter = start_adapter(undying, DLLM_MAX_INFLIGHT="4", **QUICK)
    jobs = adapter.submit_batch([f"prompt {i}" for i in range(16)], **UNIQUE)
    some_finished(adapter, jobs)
    long = {"prompt": "a", "gen_length": 512, "ignore_eos": True}
    with requests.post(
        f"{adapter.url}/v1/generate/stream", json=long, stream=True, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines) == b"event: step"
        stub_of(undying, "dllm").kill()
        killed = time.monotonic()
        assert [line for line in lines if line.startswith(b"event: ")][-1] == b"event: error"
        assert time.monotonic() - killed < 2
    eventually(lambda: adapter.health() == 503, "the death is noticed")
    eventually(lambda: adapter.health() == 200, "the server is back")
    assert len({adapter.finished(job) for job in jobs}) == len(jobs)


@pytest.fixture
def paired(checkpoint: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """A tritonserver with two instances of the model, started again by itself when it dies."""
    repository = changed_repository(tmp_path, instances=2, can_hang=True)
    settings = {"OMP_NUM_THREADS": "1", "DLLM_STEP_TIMEOUT": "5"}
    with (
        triton_server(checkpoint, repository=repository, settings=settings) as server,
        kept_running(server),
    ):
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_lost_instance(
    start_adapter: StartAdapter, paired: TritonServer, how: str, tmp_path: Path
) -> None:
    """One of two instances is killed, or hangs in a step, while the other one sends events.

    The server ends with it, both start again, and no job is lost.
    """
    adapter = start_adapter(paired, DLLM_MAX_INFLIGHT="8", **QUICK)
    jobs: list[int] = []

    def submit_some() -> None:
        prompts = [f"prompt {len(jobs) + i}" for i in range(20)]
        jobs.extend(adapter.submit_batch(prompts, **UNIQUE | {"gen_length": 200}))

    def noticed() -> bool:
        if adapter.statuses(jobs[-16:]) != ["running"] * 16:  # twice what runs at a time
            submit_some()
        return adapter.health() == 503

    submit_some()
    some_finished(adapter, jobs)
    victim = stub_of(paired, "dllm", 1)
    if how == "killed":
        victim.kill()
    else:
        hang(tmp_path, victim.pid)
    eventually(noticed, "the death is noticed")
    assert "running" in adapter.statuses(jobs), "too late: all jobs were done"

    def replaced() -> bool:
        # The server has ended, or is about to start.
        with suppress(psutil.NoSuchProcess, AssertionError):
            return adapter.health() == 200 and stub_of(paired, "dllm", 1) != victim
        return False

    eventually(replaced, "both are back")
    assert len({adapter.finished(job) for job in jobs}) == len(jobs)


@pytest.mark.slow
def test_stopped_triton(start_adapter: StartAdapter, mortal: TritonServer) -> None:
    """While Triton is away health says 503 and jobs are accepted; they finish once it is back."""
    adapter = start_adapter(mortal, **QUICK)
    assert adapter.finished(adapter.submit("before"))
    mortal.stop()
    eventually(lambda: adapter.health() == 503, "Triton is missed")
    jobs = adapter.submit_batch(["meanwhile", "later"], gen_length=8)
    assert adapter.statuses(jobs) == ["running"] * 2
    mortal.start()
    eventually(lambda: adapter.health() == 200, "Triton is back")
    for job in jobs:
        assert adapter.finished(job)


@pytest.mark.slow
def test_many_refusals(start_adapter: StartAdapter, mortal: TritonServer) -> None:
    """Hundreds of calls that the engine refuses, many at once, leave the server standing."""
    adapter = start_adapter(mortal, **QUICK)
    body = {"prompt": "x", "remasking": "best"}

    def refused(call: str) -> int:
        return requests.post(f"{adapter.url}/v1/{call}", json=body, timeout=60).status_code

    with ThreadPoolExecutor(64) as pool:
        for _ in range(8):
            calls = ["generate/stream", "generate"] * 32
            assert list(pool.map(refused, calls)) == [422] * 64
            assert mortal.running, mortal.log_tail[-15:]
    assert adapter.finished(adapter.submit("still there"))
