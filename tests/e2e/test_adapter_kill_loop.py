"""kill -9 of everything, again and again: no accepted job is lost, and none is run twice over."""

from __future__ import annotations

import sqlite3
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests

from launcher.tritonserver import TritonServer
from tests.conftest import StartAdapter
from tests.support.servers import AdapterServer, eventually, metric, stub_of, triton_server

QUICK = {
    "DLLM_LEASE_SECONDS": "3",
    "DLLM_PROBE_INTERVAL": "0.5",
    "DLLM_STREAM_INTERVAL": "0.5",
    "DLLM_ENGINE_IDLE_TIMEOUT": "20",
    "DLLM_MAX_INFLIGHT": "8",
}
#: Sampled without a seed: a job that ran twice would not have the same text again.
UNIQUE = {"temperature": 1.0, "gen_length": 64, "ignore_eos": True}


def kill_a_worker(adapter: AdapterServer, _: TritonServer) -> None:
    victim = adapter.worker_processes()[0]
    victim.kill()
    victim.wait(30)


def kill_all_workers(adapter: AdapterServer, _: TritonServer) -> None:
    adapter.kill()
    adapter.start()


def kill_the_engine(_: AdapterServer, triton: TritonServer) -> None:
    """Kill it, or find it gone: the server is about to start again."""
    with suppress(AssertionError, RuntimeError, psutil.NoSuchProcess):
        stub_of(triton, "dllm").kill()


def kill_tritonserver(_: AdapterServer, triton: TritonServer) -> None:
    with suppress(RuntimeError, psutil.NoSuchProcess):
        psutil.Process(triton.pid).kill()


class Ledger:
    """Accepted jobs and the results seen so far; a result must never change."""

    def __init__(self, adapter: AdapterServer) -> None:
        self.adapter = adapter
        self.accepted: list[int] = []
        self.seen: dict[int, tuple[object, object, object]] = {}

    def submit(self, count: int) -> None:
        """Submit; a call that dies with its worker is made again, under the same key."""
        prompts, key = [f"prompt {n}" for n in range(count)], uuid.uuid4().hex

        def accepted() -> bool:
            with suppress(requests.ConnectionError):
                self.accepted += self.adapter.submit_batch(prompts, key=key, **UNIQUE)
                return True
            return False

        eventually(accepted, "the jobs are accepted")

    def look(self) -> None:
        """Poll everything that is not known to be done."""
        for job in self.accepted:
            with suppress(requests.ConnectionError):
                body = self.adapter.result(job)
                if body["status"] != "running":
                    now = (body["status"], body["text"], body.get("error"))
                    assert self.seen.setdefault(job, now) == now, "a result has changed"

    @property
    def settled(self) -> bool:
        """Everything that was accepted is done."""
        self.look()
        return len(self.seen) == len(self.accepted)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def test_kills_in_a_loop(
    start_adapter: StartAdapter,
    undying: TritonServer,
    database: str,
    request: pytest.FixtureRequest,
) -> None:
    """After kills of workers, adapter, engine and server every job is finished or has a reason."""
    settings = dict(QUICK)
    if database == "postgresql":
        settings["DLLM_DATABASE_URL"] = request.getfixturevalue("postgres").fresh_database()
    adapter = start_adapter(undying, workers=2, **settings)
    ledger = Ledger(adapter)
    for kill in (
        kill_a_worker,
        kill_the_engine,
        kill_all_workers,
        kill_tritonserver,
    ):
        ledger.submit(24)
        before = len(ledger.seen)
        eventually(lambda: ledger.look() or len(ledger.seen) > before, "something is done")  # noqa: B023
        kill(adapter, undying)
        ledger.look()
    eventually(lambda: adapter.health() == 200, "the engine is back")
    eventually(lambda: ledger.settled, "all jobs are done", seconds=300)

    assert len(set(ledger.accepted)) == len(ledger.accepted) == 4 * 24
    finished = [text for status, text, _ in ledger.seen.values() if status == "finished"]
    failed = [error for status, _, error in ledger.seen.values() if status == "failed"]
    assert len(finished) + len(failed) == len(ledger.accepted)
    assert len(set(finished)) == len(finished)
    assert all(str(error).startswith("given up after 3 attempts: ") for error in failed)
    assert len(failed) <= len(finished) / 10, failed
    fresh = adapter.submit("next", gen_length=8)
    assert fresh == len(ledger.accepted), "some jobs were stored but never acknowledged"
    assert adapter.finished(fresh) is not None


@pytest.mark.slow
def test_one_of_two_tritonservers_is_killed(
    checkpoint: Path, tmp_path: Path, start_adapter: StartAdapter, undying: TritonServer
) -> None:
    """Both take their share; when one dies the other goes on alone, and its jobs move there."""
    one = undying
    with triton_server(checkpoint, log_file=tmp_path / "two.log") as two:
        urls = f"{one.grpc_url},{two.grpc_url}"
        adapter = start_adapter(one, workers=2, **{**QUICK, "DLLM_TRITON_URL": urls})
        jobs = adapter.submit_batch([f"prompt {n}" for n in range(48)], **UNIQUE)
        eventually(
            lambda: "finished" in adapter.statuses(jobs[:12]), "the first of the jobs are done"
        )
        assert "running" in adapter.statuses(jobs)
        psutil.Process(two.pid).kill()
        assert adapter.health() == 200
        texts = [adapter.finished(job) for job in jobs]
        assert len(set(texts)) == len(jobs)

        two.stop()
        two.start()
        kill_the_engine(adapter, one)
        more = adapter.submit_batch([f"prompt {n}" for n in range(24)], **UNIQUE)
        assert len({adapter.finished(job) for job in more}) == len(more)
        eventually(
            lambda: metric(two, "dllm_requests_finished_total") > 0, "the other has done its part"
        )


@pytest.mark.slow
def test_job_that_kills_the_engine_fails_by_itself(
    start_adapter: StartAdapter, undying: TritonServer, tmp_path: Path
) -> None:
    """Each time one certain job runs, the engine dies: that job fails, and all others finish."""
    adapter = start_adapter(undying, workers=2, **{**QUICK, "DLLM_MAX_INFLIGHT": "16"})
    others = adapter.submit_batch([f"prompt {n}" for n in range(5)], **UNIQUE)
    poison = adapter.submit("poison", **{**UNIQUE, "gen_length": 512})
    others += adapter.submit_batch([f"prompt {n}" for n in range(18)], **UNIQUE)

    def state() -> tuple[str, int, float]:
        with sqlite3.connect(f"file:{tmp_path}/jobs.db?mode=ro", uri=True) as connection:
            query = "SELECT state, attempts, started_at FROM jobs WHERE id = ?"
            return tuple(connection.execute(query, (poison,)).fetchone())

    # A run that the engine had not begun yet costs no attempt; there may be more deaths than three.
    fatal: set[float] = set()
    while (now := state())[0] in ("queued", "running"):
        if now[0] == "running" and now[2] not in fatal and time.time() - now[2] > 1:
            fatal.add(now[2])
            kill_the_engine(adapter, undying)
        time.sleep(0.05)
    assert now[:2] == ("failed", 3)
    assert len(fatal) >= 3
    body = adapter.result(poison)
    assert str(body["error"]).startswith("given up after 3 attempts: ")
    assert len({adapter.finished(job) for job in others}) == len(others)
