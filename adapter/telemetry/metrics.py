"""Counters and timings for Prometheus. The engine's are on Triton's own metrics port.

Several workers count together if PROMETHEUS_MULTIPROC_DIR names a directory that is empty when they
start; without it each worker shows its own figures.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from adapter.types import Usage

REGISTRY = CollectorRegistry()

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

HTTP_REQUESTS = Counter(
    "dllm_adapter_http_requests",
    "HTTP requests answered",
    ["method", "route", "status"],
    registry=REGISTRY,
)
HTTP_SECONDS = Histogram(
    "dllm_adapter_http_request_seconds",
    "Duration of HTTP requests, including the wait of held polls",
    ["method", "route"],
    buckets=(*SHORT, 30, 60, 300),
    registry=REGISTRY,
)
JOBS_SUBMITTED = Counter("dllm_adapter_jobs_submitted", "Jobs accepted", registry=REGISTRY)
JOBS_SETTLED = Counter(
    "dllm_adapter_jobs_settled",
    "Runs of jobs by outcome: finished, failed, interrupted, snoozed, superseded",
    ["outcome"],
    registry=REGISTRY,
)
JOBS_DONE = Counter(
    "dllm_adapter_jobs_done",
    "Jobs by final state: finished, failed, cancelled; each counted once, wherever it ended",
    ["state"],
    registry=REGISTRY,
)
JOB_QUEUE_SECONDS = Histogram(
    "dllm_adapter_job_queue_seconds",
    "Time from a job's submission until a worker claimed it",
    buckets=LONG,
    registry=REGISTRY,
)
JOB_RUN_SECONDS = Histogram(
    "dllm_adapter_job_run_seconds",
    "Time from claiming a job until it finished, including the engine's queue",
    buckets=LONG,
    registry=REGISTRY,
)
TOKENS = Counter("dllm_adapter_tokens", "Tokens of finished requests", ["kind"], registry=REGISTRY)
STEPS = Counter(
    "dllm_adapter_denoising_steps", "Denoising steps of finished requests", registry=REGISTRY
)
FORWARD_PASSES = Counter(
    "dllm_adapter_forward_passes", "Forward passes of finished requests", registry=REGISTRY
)
INFLIGHT = Gauge(
    "dllm_adapter_inflight_requests",
    "Requests at Triton, waiting or running, of all workers",
    multiprocess_mode="livesum",
    registry=REGISTRY,
)
ENGINE_READY = Gauge(
    "dllm_adapter_engine_ready",
    "1 while the engine answers",
    ["engine"],
    multiprocess_mode="livemax",
    registry=REGISTRY,
)
ENGINE_RELOADS = Counter(
    "dllm_adapter_engine_reloads", "Engines replaced", ["engine"], registry=REGISTRY
)
STORE_SECONDS = Histogram(
    "dllm_adapter_store_seconds",
    "Duration of database transactions, including lock waits",
    ["kind"],
    buckets=SHORT,
    registry=REGISTRY,
)
#: Looking a label up takes longer than observing a value.
_STORE_SECONDS = {kind: STORE_SECONDS.labels(kind) for kind in ("read", "write")}
_PROMPT_TOKENS, _COMPLETION_TOKENS = TOKENS.labels("prompt"), TOKENS.labels("completion")


def count_usage(usage: Usage) -> None:
    """Count the usage of a finished request."""
    _PROMPT_TOKENS.inc(usage.prompt_tokens)
    _COMPLETION_TOKENS.inc(usage.completion_tokens)
    STEPS.inc(usage.steps)
    FORWARD_PASSES.inc(usage.forward_passes)


def observe_transaction(kind: str, seconds: float) -> None:
    """Record how long a transaction took."""
    _STORE_SECONDS[kind].observe(seconds)


async def exposition(jobs: Mapping[str, int] | None) -> bytes:
    """The metrics of all workers in Prometheus's text format, and `jobs` by state if known."""
    registry = REGISTRY
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        _remove_gauges_of_dead_workers(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    page = await asyncio.to_thread(generate_latest, registry)
    if jobs is None:
        return page
    active = CollectorRegistry()
    active.register(_Jobs(jobs))
    return page + generate_latest(active)


def _remove_gauges_of_dead_workers(folder: Path) -> None:
    for pid in {int(file.stem.rpartition("_")[2]) for file in folder.glob("gauge_live*.db")}:
        if not _is_alive(pid):
            with suppress(FileNotFoundError):  # another worker does the same
                mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


class _Jobs(Collector):
    """Unfinished jobs in the database, of all machines."""

    def __init__(self, jobs: Mapping[str, int]) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "dllm_adapter_jobs", "Unfinished jobs in the database by state", labels=["state"]
        )
        for state, count in self._jobs.items():
            family.add_metric([state], count)
        yield family
