"""Runs real servers for tests: tritonserver over our model repository, and the adapter.

Both run under the launcher's guard: however a test ends, no process and no shared memory stays.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import requests

from launcher.ports import free_port
from launcher.process import GuardedProcess
from launcher.tritonserver import TritonServer

CHECKOUT = Path(__file__).resolve().parents[2]
REPOSITORY = CHECKOUT / "model_repository"
#: Generous: these tests may share two cores with other work.
PATIENCE = 120.0

COUNTERS = (
    "dllm_steps_total",
    "dllm_refreshes_total",
    "dllm_step_seconds_total",
    "dllm_forward_passes_total",
    "dllm_batched_tokens_total",
    "dllm_completion_tokens_total",
    "dllm_requests_finished_total",
    "dllm_requests_cancelled_total",
    "dllm_requests_failed_total",
)


def eventually(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait until the condition holds; the error names `what`."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


def triton_server(
    checkpoint: Path,
    *,
    repository: Path = REPOSITORY,
    log_file: Path | None = None,
    settings: Mapping[str, str] | None = None,
    extra_args: Sequence[str] = (),
) -> TritonServer:
    """tritonserver with both of our models on free ports; not started yet."""
    return TritonServer(
        repository,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        start_timeout=PATIENCE,
        env={"MODEL_PATH": str(checkpoint), "DLLM_DEVICE": "cpu", **(settings or {})},
        log_file=log_file,
        extra_args=extra_args,
    )


@contextmanager
def kept_running(server: TritonServer) -> Iterator[list[float]]:
    """Restart the server whenever it dies, as the launcher, Docker and systemd do.

    A killed model process may have held a lock that it shares with tritonserver, which then ends
    too. Yields the times of its deaths.
    """
    over = threading.Event()
    deaths: list[float] = []

    def watch() -> None:
        while not over.wait(0.2):
            if not server.running:
                deaths.append(time.monotonic())
                server.stop()
                server.start()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield deaths
    finally:
        over.set()
        watcher.join()


def metric(server: TritonServer, name: str, model: str = "dllm", **labels: str) -> float:
    """The current value of a model's metric with these labels."""
    page = requests.get(server.metrics_url, timeout=30).text
    wanted = "".join(rf'(?=[^}}]*{key}="{value}")' for key, value in labels.items())
    pattern = rf'^{name}\{{(?=[^}}]*model="{model}"){wanted}[^}}]*\}} (\S+)$'
    found = re.search(pattern, page, re.MULTILINE)
    assert found is not None, f"no metric {name} of {model}"
    return float(found.group(1))


def settled_counters(server: TritonServer) -> dict[str, float]:
    """Wait until the engine's counters stop changing; they are published about once a second."""
    known: dict[str, float] = {}
    while (now := {name: metric(server, name) for name in COUNTERS}) != known:
        known = now
        time.sleep(2.5)
    return now


def stub_of(server: TritonServer, model: str, instance: int = 0) -> psutil.Process:
    """The process in which the server runs a model's Python code."""
    for process in psutil.Process(server.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just been killed
            if f"{model}_0_{instance}" in process.cmdline():
                return process
    raise AssertionError(f"the server runs no process for {model}")


def has_ended(process: psutil.Process) -> bool:
    """Whether the process is gone or a zombie."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class AdapterServer:
    """`python -m adapter` on a free port, with its jobs in a SQLite file.

    A context manager that enters once the adapter is healthy. After `kill` or `stop` it can be
    started again, on the same port and database.
    """

    def __init__(
        self,
        triton: TritonServer,
        database: Path,
        *,
        workers: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._workers = workers
        self._log_file = database.with_suffix(".log")
        self._drain = float((settings or {}).get("DLLM_DRAIN_SECONDS", 5))
        self._env = {
            "DLLM_TRITON_URL": triton.grpc_url,
            "DLLM_DATABASE_URL": f"sqlite:///{database}",
            **(settings or {}),
        }
        self._process: GuardedProcess | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """The adapter's log."""
        return self._log_file.read_text()

    def start(self) -> None:
        """Start and wait until it is healthy."""
        command = [sys.executable, "-m", "adapter", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", str(self._workers)]
        command += ["--timeout-graceful-shutdown", "2"]
        # As the launcher does: a new folder for the metrics of each start's workers.
        metrics = tempfile.mkdtemp(prefix="metrics-", dir=self._log_file.parent)
        self._process = GuardedProcess(
            command,
            name="adapter",
            env={**os.environ, **self._env, "PROMETHEUS_MULTIPROC_DIR": metrics},
            grace=self._drain + 10.0,
            log_file=self._log_file,
        )
        try:
            eventually(self._healthy_or_dead, f"the adapter is healthy\n{self.log[-2000:]}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the adapter with SIGTERM, as an operator would."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def kill(self) -> None:
        """Kill every process of the adapter with SIGKILL."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self.stop()

    def worker_processes(self) -> list[psutil.Process]:
        """The worker processes, when there are several."""
        assert self._process is not None
        children = psutil.Process(self._process.pid).children()
        return [p for p in children if any("spawn_main" in part for part in p.cmdline())]

    def health(self) -> int:
        """HTTP status of the health check; 0 without a response."""
        try:
            return requests.get(f"{self.url}/v1/health", timeout=30).status_code
        except requests.ConnectionError:
            return 0

    def submit(self, prompt: str, **fields: object) -> int:
        """Submit one prompt; returns its job's id."""
        return self._submit("generate", {"prompt": prompt, **fields})[0]

    def submit_batch(
        self, prompts: list[str], *, key: str | None = None, **fields: object
    ) -> list[int]:
        """Submit several prompts, with an idempotency key if given; returns their jobs' ids."""
        return self._submit("generate_batch", {"prompts": prompts, **fields}, key)

    def result(self, request_id: int) -> dict[str, object]:
        """The job's current state."""
        response = requests.get(f"{self.url}/v1/result/{request_id}", timeout=30)
        response.raise_for_status()
        body: dict[str, object] = response.json()
        return body

    def statuses(self, request_ids: list[int]) -> list[object]:
        """The state of each job."""
        return [self.result(request_id)["status"] for request_id in request_ids]

    def finished(self, request_id: int) -> str:
        """Wait until the job is finished; returns its text."""
        eventually(lambda: self.result(request_id)["status"] != "running", f"job {request_id}")
        body = self.result(request_id)
        assert body["status"] == "finished", body
        return str(body["text"])

    def _submit(self, call: str, body: Mapping[str, object], key: str | None = None) -> list[int]:
        headers = {} if key is None else {"Idempotency-Key": key}
        response = requests.post(f"{self.url}/v1/{call}", json=body, headers=headers, timeout=30)
        assert response.status_code == 200, response.text
        ids: list[int] = response.json()["request_ids"]
        return ids

    def _healthy_or_dead(self) -> bool:
        assert self._process is not None
        if not self._process.running:
            raise self._process.died()
        return self.health() == 200
