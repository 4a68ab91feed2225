"""Runs ten thousand jobs while workers are killed and clients disconnect: `make soak`.

The stack is real: tritonserver with the demo checkpoint, the adapter with several workers over one
database. Every few seconds a worker is killed with SIGKILL. Clients submit batches of mixed sizes,
poll, cancel, and break off held polls and streams. At the end the database must have every accepted
job. Writes `benchmarks/results/soak.json` and `soak.png`; exits with 1 if a job was lost or ran
twice.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import socket
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import psutil
import requests

from benchmarks.common import DEMO_CHECKPOINT, RESULTS, write_json
from launcher.tritonserver import TritonServer
from tests.support.servers import AdapterServer, kept_running, triton_server

SETTINGS = {
    "DLLM_LEASE_SECONDS": "5",
    "DLLM_MAX_QUEUED_JOBS": "100000",
    "DLLM_MAX_INFLIGHT": "64",
    "DLLM_PROBE_INTERVAL": "2",
    "DLLM_LOG_LEVEL": "WARNING",
}
SIZES = (4, 8, 12, 16)
QUESTIONS = ("What is 17 + 25?", "Sort these numbers: 5 3 9 1", "What is the capital of France?")
POLL_PAUSE = 0.1
MIB = 2**20

Body = dict[str, Any]


@dataclass
class Record:
    """Responses that clients got, and measurements."""

    accepted: list[int] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    polls: list[tuple[float, float]] = field(default_factory=list)
    broken_polls: int = 0
    delays: list[float] = field(default_factory=list)
    broken_submissions: int = 0
    vanished: int = 0
    kills: list[float] = field(default_factory=list)
    samples: list[Body] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Soak:
    """The clients, the killer and the monitor."""

    def __init__(self, adapter: AdapterServer, database: Path, triton: TritonServer) -> None:
        self.adapter = adapter
        self.database = database
        self.triton = triton
        self.record = Record()
        self.begun = time.monotonic()
        self.newest = multiprocessing.Value("q", -1)
        self.over = threading.Event()

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun

    def submit(self, count: int, seed: int) -> None:
        """Submit `count` jobs in batches of mixed sizes; repeat a call that breaks off."""
        dice, session, done = random.Random(seed), requests.Session(), 0
        while done < count:
            size = min(count - done, dice.choice((1, 2, 8, 64)))
            length = dice.choice(SIZES)
            prompts = [dice.choice(QUESTIONS) + " " * dice.randrange(200) for _ in range(size)]
            body = {"prompts": prompts, "gen_length": length, "steps": max(1, length // 4)}
            ids = self._submitted(session, body)
            done += size
            with self.record.lock:
                self.record.accepted += ids
                self.newest.value = ids[-1]

    def _submitted(self, session: requests.Session, body: Body) -> list[int]:
        """Repeat the call under one key until it is answered, so that its jobs exist once."""
        call, headers = f"{self.adapter.url}/v1/generate_batch", {"Idempotency-Key": uuid4().hex}
        while True:
            try:
                answer = session.post(call, json=body, headers=headers, timeout=60)
            except requests.RequestException:
                with self.record.lock:
                    self.record.broken_submissions += 1
                time.sleep(0.2)
                continue
            if answer.status_code == 200:
                ids: list[int] = answer.json()["request_ids"]
                return ids
            time.sleep(float(answer.headers.get("Retry-After", 1)))

    def vanish(self, seed: int) -> None:
        """Cancel some jobs, and break off held polls and streams."""
        dice = random.Random(seed)
        while not self.over.wait(0.5):
            if not self.record.accepted:
                continue
            job = dice.choice(self.record.accepted)
            if dice.random() < 0.2:
                with suppress(requests.RequestException):
                    requests.delete(f"{self.adapter.url}/v1/result/{job}", timeout=60)
                    self.record.cancelled.add(job)
                continue
            if dice.random() < 0.5:
                request = f"GET /v1/result/{job}?wait=60 HTTP/1.1\r\nHost: a\r\n\r\n"
            else:
                body = json.dumps({"prompt": "What is AI?", "gen_length": 64})
                request = (
                    "POST /v1/generate/stream HTTP/1.1\r\nHost: a\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                )
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.adapter.port)) as s:
                s.sendall(request.encode())
                time.sleep(0.1)
                self.record.vanished += 1

    def kill(self, interval: float, seed: int) -> None:
        """Kill a worker with SIGKILL, again and again; uvicorn starts another."""
        dice = random.Random(seed)
        while not self.over.wait(interval):
            with suppress(psutil.NoSuchProcess, IndexError):
                dice.choice(self.adapter.worker_processes()).kill()
                self.record.kills.append(self.now)

    def watch(self) -> None:
        """Record memory, queue and database once a second."""
        while not self.over.wait(1.0):
            states = self.states()
            engine = 0
            with suppress(psutil.NoSuchProcess, RuntimeError):  # it may be restarting
                server = psutil.Process(self.triton.pid)
                engine = sum(map(memory, (server, *server.children(recursive=True))))
            workers: list[int] = []
            with suppress(psutil.NoSuchProcess):  # it may be killed meanwhile
                workers = [memory(process) for process in self.adapter.worker_processes()]
            self.record.samples.append(
                {
                    "seconds": round(self.now, 1),
                    "queued": states["queued"],
                    "running": states["running"],
                    "finished": states["finished"],
                    "largest_worker_mib": round(max(workers) / MIB, 1) if workers else None,
                    "triton_mib": round(engine / MIB, 1),
                    "load": psutil.getloadavg()[0],
                    "database_mib": round(self.database_bytes() / MIB, 2),
                }
            )

    def database_bytes(self) -> int:
        """Size of the database file with its log."""
        log = self.database.with_name(f"{self.database.name}-wal")
        return sum(path.stat().st_size for path in (self.database, log) if path.exists())

    def states(self) -> Counter[str]:
        """Number of jobs by state, from the database."""
        with sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=30) as connection:
            return Counter(dict(connection.execute("SELECT state, count(*) FROM jobs GROUP BY 1")))

    def verdict(self) -> Body:
        """Check every accepted job: lost, failed, run twice."""
        with sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=30) as connection:
            columns = "SELECT id, state, text, error, request, num_rescues, attempts FROM jobs"
            rows = {row[0]: row[1:] for row in connection.execute(columns)}
        accepted = set(self.record.accepted)
        answers: dict[str, set[str]] = {}
        for state, text, _, request, *_ in rows.values():
            if state == "finished":
                answers.setdefault(request, set()).add(text)
        uncancelled = [rows[job] for job in accepted - self.record.cancelled if job in rows]
        return {
            "accepted": len(accepted),
            "ids_given_twice": len(self.record.accepted) - len(accepted),
            "lost": sum(job not in rows for job in accepted),
            "not_done": sum(row[0] in ("queued", "running") for row in rows.values()),
            "finished": sum(row[0] == "finished" for row in uncancelled),
            "failed": sum(row[0] == "failed" for row in uncancelled),
            "failed_without_reason": sum(r[0] == "failed" and not r[2] for r in rows.values()),
            "cancelled_by_nobody": sum(row[0] == "cancelled" for row in uncancelled),
            "stored_but_never_acknowledged": len(rows.keys() - accepted),
            "jobs_that_lost_a_worker": sum(row[4] > 0 for row in rows.values()),
            "jobs_that_lost_an_engine": sum(row[5] > 0 for row in rows.values()),
            "most_workers_lost_by_a_job": max(row[4] for row in rows.values()),
            "same_question_with_two_answers": sum(len(texts) > 1 for texts in answers.values()),
        }


def poll(url: str, newest: Any, ended: Any, begun: float, out: Any) -> None:
    """Poll random jobs from four clients, and time every response."""
    times: list[tuple[float, float]] = []
    broken: list[int] = []

    def client(seed: int) -> None:
        dice, session = random.Random(seed), requests.Session()
        while not ended.wait(POLL_PAUSE):
            if newest.value < 0:
                continue
            job = dice.randint(0, newest.value)
            began = time.perf_counter()
            try:
                answer = session.get(f"{url}/v1/result/{job}", timeout=60)
                assert answer.status_code == 200, answer.text
            except requests.RequestException:
                broken.append(job)
            else:
                times.append((time.monotonic() - begun, time.perf_counter() - began))

    delays: list[float] = []

    def idle() -> None:
        """Record how late the machine wakes a sleeping process: no poll can be faster."""
        while not ended.is_set():
            began = time.perf_counter()
            time.sleep(0.05)
            delays.append(time.perf_counter() - began - 0.05)

    sleeper = threading.Thread(target=idle)
    sleeper.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    sleeper.join()
    out.put((times, len(broken), delays))


def memory(process: psutil.Process) -> int:
    """Resident bytes; 0 for a process that has ended."""
    with suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def run(soak: Soak, jobs: int, kill_interval: float, patience: float) -> tuple[float, float]:
    """Seconds until all jobs were accepted, and until all were done. Raises TimeoutError."""
    backgrounds: list[Callable[[], None]] = [
        soak.watch,
        lambda: soak.kill(kill_interval, 1),
        *(lambda seed=seed: soak.vanish(seed) for seed in range(10, 12)),
    ]
    threads = [threading.Thread(target=target, daemon=True) for target in backgrounds]
    for thread in threads:
        thread.start()
    # In another process, so that our own threads do not distort the times.
    polled: Any = multiprocessing.Queue()
    ended = multiprocessing.Event()
    arguments = (soak.adapter.url, soak.newest, ended, soak.begun, polled)
    poller = multiprocessing.Process(target=poll, args=arguments, daemon=True)
    poller.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            shares = [jobs // 4] * 3 + [jobs - 3 * (jobs // 4)]
            list(pool.map(soak.submit, shares, range(100, 104)))
        accepted = soak.now
        while (states := soak.states())["queued"] + states["running"]:
            if soak.now > patience:
                msg = f"not done after {patience:g} s: {states}"
                raise TimeoutError(msg)
            print(f"{soak.now:6.0f} s  {dict(states)}", flush=True)
            time.sleep(5)
        return accepted, soak.now
    finally:
        soak.over.set()
        ended.set()
        soak.record.polls, soak.record.broken_polls, soak.record.delays = polled.get(timeout=120)
        for thread in threads:
            thread.join(90)


def plot(record: Record, path: Path) -> None:
    """Plot jobs, memory and poll times over time."""
    figure, (jobs, mem, polls) = plt.subplots(3, 1, figsize=(9, 9), sharex=True)
    seconds = [sample["seconds"] for sample in record.samples]
    for name in ("queued", "running", "finished"):
        jobs.plot(seconds, [sample[name] for sample in record.samples], label=name)
    for axis in (jobs, polls):
        for moment in record.kills:
            axis.axvline(moment, color="0.85", linewidth=0.8, zorder=0)
    jobs.set_ylabel("jobs")
    jobs.set_title("10,000 jobs; grey lines: a worker is killed" if len(record.accepted) >= 10_000
                   else f"{len(record.accepted)} jobs; grey lines: a worker is killed")  # fmt: skip
    jobs.legend()
    for name in ("largest_worker_mib", "triton_mib", "database_mib"):
        mem.plot(seconds, [sample[name] for sample in record.samples], label=name[:-4])
    mem.set_ylabel("MiB")
    mem.legend()
    polls.plot(*zip(*((at, 1000 * took) for at, took in record.polls), strict=True), ".", ms=2)
    polls.axhline(50, color="tab:red", linewidth=0.8)
    polls.set_yscale("log")
    polls.set_ylabel("poll, ms")
    polls.set_xlabel("s")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-interval", type=float, default=5.0, help="seconds between kills")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    parser.add_argument("--patience", type=float, default=1800.0, help="time limit in seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dllm-soak-") as folder:
        database = Path(folder) / "jobs.db"
        log_file = Path(folder) / "triton.log"
        with (
            triton_server(DEMO_CHECKPOINT, log_file=log_file) as triton,
            kept_running(triton) as deaths,
        ):
            adapter = AdapterServer(triton, database, workers=options.workers, settings=SETTINGS)
            with adapter:
                soak = Soak(adapter, database, triton)
                try:
                    accepted, done = run(
                        soak, options.jobs, options.kill_interval, options.patience
                    )
                finally:
                    if options.logs is not None:
                        options.logs.mkdir(exist_ok=True)
                        for log in Path(folder).glob("*.log"):
                            shutil.copy(log, options.logs)
                verdict = soak.verdict()
    record = soak.record
    times = [1000 * took for _, took in record.polls]
    whole = [sample for sample in record.samples if sample["largest_worker_mib"] is not None]
    half = next(sample for sample in whole if sample["finished"] >= options.jobs // 2)
    result = {
        "command": "make soak",
        "jobs": options.jobs,
        "workers": options.workers,
        "database": "SQLite",
        "kill_interval_s": options.kill_interval,
        "workers_killed": len(record.kills),
        "load_average": {
            "median": round(statistics.median(sample["load"] for sample in record.samples), 1),
            "max": round(max(sample["load"] for sample in record.samples), 1),
        },
        "accepted_after_s": round(accepted, 1),
        "done_after_s": round(done, 1),
        "jobs_per_s": round(options.jobs / done, 1),
        "polls": {
            "count": len(times),
            "median_ms": round(statistics.median(times), 1),
            "p99_ms": round(percentile(times, 0.99), 1),
            "max_ms": round(max(times), 1),
            "broken_by_a_kill": record.broken_polls,
            "p99_ms_of_waking_a_sleeping_thread": round(1000 * percentile(record.delays, 0.99), 1),
        },
        "deaths_of_tritonserver": len(deaths),
        "submissions_broken_by_a_kill": record.broken_submissions,
        "clients_that_vanished": record.vanished,
        "memory_mib": {
            name: {
                "at_the_start": whole[0][f"{name}_mib"],
                "after_half_of_the_jobs": half[f"{name}_mib"],
                "at_the_end": whole[-1][f"{name}_mib"],
            }
            for name in ("largest_worker", "triton", "database")
        },
        "verdict": verdict,
    }
    print(json.dumps(result, indent=2))
    write_json("soak", result)
    plot(record, RESULTS / "soak.png")
    bad = ("lost", "not_done", "ids_given_twice", "failed_without_reason", "cancelled_by_nobody")
    sys.exit(any(verdict[name] for name in (*bad, "stored_but_never_acknowledged")))


if __name__ == "__main__":
    main()
