"""Counters and timings for Prometheus. The engine's are on Triton's own metrics port.

Several workers count together if PROMETHEUS_MULTIPROC_DIR names a directory that is empty when they
start; without it each worker shows its own figures.
"""

import asyncio
import functools
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from adapter.settings import refuse_start
from adapter.types import Event, Usage

# A series `_created` beside each counter and bucket would be a quarter of the page.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Prometheus's library would end in a traceback.
_FOLDER = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
if _FOLDER and not os.access(_FOLDER, os.W_OK):
    refuse_start(f"PROMETHEUS_MULTIPROC_DIR={_FOLDER}: should be a folder that it may write to")

REGISTRY = CollectorRegistry()

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
#: OpenTelemetry's buckets for generative AI.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
TOKEN = (*SHORT[:6], 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

_counter = functools.partial(Counter, registry=REGISTRY)
_histogram = functools.partial(Histogram, registry=REGISTRY)
_gauge = functools.partial(Gauge, registry=REGISTRY)

HTTP_REQUESTS = _counter(
    "dllm_adapter_http_requests", "HTTP requests answered", ["method", "route", "status"]
)
HTTP_SECONDS = _histogram(
    "dllm_adapter_http_request_seconds",
    "Duration of HTTP requests, but for held polls and streams",
    ["method", "route"],
    buckets=(*SHORT, 30, 60, 300),
)
POLL_SECONDS = _histogram(
    "dllm_adapter_http_poll_seconds",
    "Duration of polls with `wait`",
    ["route"],
    buckets=(*SHORT, 30, 60),
)
STREAM_SECONDS = _histogram(
    "dllm_adapter_http_stream_seconds",
    "Duration of responses that are streams of events",
    ["route"],
    buckets=LONG,
)
#: OpenTelemetry's names for generative AI, of streams.
FIRST_TOKEN_SECONDS = _histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "Time from a streaming request's start until its first text",
    buckets=FIRST_TOKEN,
)
TOKEN_SECONDS = _histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Time per token of a streaming request after its first text",
    buckets=TOKEN,
)
JOBS_SUBMITTED = _counter("dllm_adapter_jobs_submitted", "Jobs accepted", ["model"])
JOBS_SETTLED = _counter(
    "dllm_adapter_jobs_settled",
    "Runs of jobs by outcome: finished, failed, interrupted, snoozed, superseded",
    ["outcome"],
)
JOBS_DONE = _counter(
    "dllm_adapter_jobs_done",
    "Jobs by final state: finished, failed, cancelled; each counted once, wherever it ended",
    ["state"],
)
JOB_QUEUE_SECONDS = _histogram(
    "dllm_adapter_job_queue_seconds",
    "Time from a job's submission until a worker claimed it",
    ["model"],
    buckets=LONG,
)
JOB_RUN_SECONDS = _histogram(
    "dllm_adapter_job_run_seconds",
    "Time from claiming a job until it finished, including the engine's queue",
    ["model"],
    buckets=LONG,
)
TOKENS = _counter("dllm_adapter_tokens", "Tokens of finished requests", ["kind", "model"])
STEPS = _counter("dllm_adapter_denoising_steps", "Denoising steps of finished requests", ["model"])
FORWARD_PASSES = _counter(
    "dllm_adapter_forward_passes", "Forward passes of finished requests", ["model"]
)
INFLIGHT = _gauge(
    "dllm_adapter_inflight_requests",
    "Requests at Triton, waiting or running, of all workers",
    ["model"],
    multiprocess_mode="livesum",
)
ENGINE_READY = _gauge(
    "dllm_adapter_engine_ready",
    "1 while the model answers at this tritonserver",
    ["engine", "model"],
    multiprocess_mode="livemax",
)
STORE_SECONDS = _histogram(
    "dllm_adapter_store_seconds",
    "Duration of database transactions, including lock waits",
    ["kind"],
    buckets=SHORT,
)
DATABASE_READY = _gauge(
    "dllm_adapter_database_ready",
    "1 while the database answers, at every worker",
    multiprocess_mode="livemin",
)
TASK_LAST_STEP = _gauge(
    "dllm_adapter_task_last_step_timestamp_seconds",
    "When a background task last ended a step, at the worker where that is longest ago",
    ["task"],
    multiprocess_mode="livemin",
)
RATE_LIMIT_SKIPPED = _counter(
    "dllm_adapter_rate_limit_skipped",
    "Calls let through uncounted because the database did not answer",
)
#: Looking a label up takes longer than observing a value.
_STORE_SECONDS = {kind: STORE_SECONDS.labels(kind) for kind in ("read", "write")}


def count_call(method: str, route: str, status: int, kind: str, seconds: float) -> None:
    """Count an HTTP request and its duration; `kind` is response, poll or stream."""
    HTTP_REQUESTS.labels(method, route, str(status)).inc()
    if kind == "stream":
        STREAM_SECONDS.labels(route).observe(seconds)
    elif kind == "poll":
        POLL_SECONDS.labels(route).observe(seconds)
    else:
        HTTP_SECONDS.labels(method, route).observe(seconds)


class TokenTimer:
    """Times the text of one streaming request, from its creation on."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._first: float | None = None
        self._tokens = 0

    def observe(self, event: Event) -> None:
        """Record the first text, and the pace of the rest once the request has finished."""
        now = time.perf_counter()
        tokens = event.usage.completion_tokens if event.usage else 0
        if self._first is None and event.text:
            self._first, self._tokens = now, tokens
            FIRST_TOKEN_SECONDS.observe(now - self._began)
        if event.finish_reason and self._first is not None and tokens > self._tokens:
            TOKEN_SECONDS.observe((now - self._first) / (tokens - self._tokens))


class ModelMetrics:
    """The series of one model; made at once, so that they show as 0."""

    def __init__(self, model: str) -> None:
        self._prompt_tokens = TOKENS.labels("prompt", model)
        self._completion_tokens = TOKENS.labels("completion", model)
        self._steps, self._passes = STEPS.labels(model), FORWARD_PASSES.labels(model)
        #: Requests at Triton.
        self.inflight = INFLIGHT.labels(model)
        self.jobs_submitted = JOBS_SUBMITTED.labels(model)
        self.queue_seconds = JOB_QUEUE_SECONDS.labels(model)
        self.run_seconds = JOB_RUN_SECONDS.labels(model)

    def count_usage(self, usage: Usage) -> None:
        """Count the usage of a finished request."""
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._completion_tokens.inc(usage.completion_tokens)
        self._steps.inc(usage.steps)
        self._passes.inc(usage.forward_passes)


def forget(gauge: Gauge, *labels: str) -> None:
    """Show a gauge's series no more: what it measured is gone."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):  # its files keep every series
        gauge.labels(*labels).set(math.nan)
    else:
        gauge.remove(*labels)


def observe_transaction(kind: str, seconds: float) -> None:
    """Record how long a transaction took."""
    _STORE_SECONDS[kind].observe(seconds)


async def exposition(jobs: Mapping[tuple[str, str], int] | None) -> bytes:
    """The metrics of all workers in Prometheus's text format, with `jobs` if they are known.

    `jobs`: how many by state and model.
    """
    registry, workers = REGISTRY, {os.getpid()}
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        workers = _living_workers(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    page = await asyncio.to_thread(generate_latest, registry)
    service = CollectorRegistry()
    service.register(_Service(jobs, workers))
    return page + generate_latest(service)


def _living_workers(folder: Path) -> set[int]:
    """Process ids of the workers; removes the gauges of dead ones."""
    workers = {int(file.stem.rpartition("_")[2]) for file in folder.glob("*.db")}
    living = {pid for pid in workers if _is_alive(pid)}
    for pid in workers - living:
        with suppress(FileNotFoundError):  # another worker does the same
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
    return living


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


class _Service(Collector):
    """Figures that no worker counts: version, processes, and unfinished jobs of all machines."""

    def __init__(self, jobs: Mapping[tuple[str, str], int] | None, workers: Iterable[int]) -> None:
        self._jobs = jobs
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("dllm_adapter_build_info", "The version", labels=["version"])
        build.add_metric([version("dllm-serve")], 1)
        yield build
        yield from _process_metrics(self._workers)
        if self._jobs is not None:
            labels = ["state", "model"]
            family = GaugeMetricFamily("dllm_adapter_jobs", "Unfinished jobs", labels=labels)
            for state_and_model, count in self._jobs.items():
                family.add_metric(state_and_model, count)
            yield family


def _process_metrics(pids: Iterable[int]) -> Iterator[Metric]:
    """The conventional `process_*` metrics, summed over processes where a sum makes sense."""
    families: dict[str, list[Metric]] = {}
    for pid in pids:
        for family in ProcessCollector(pid=functools.partial(int, pid), registry=None).collect():
            families.setdefault(family.name, []).append(family)
    for name, found in families.items():
        combine = min if name in ("process_start_time_seconds", "process_max_fds") else sum
        value = combine(family.samples[0].value for family in found)
        sample = found[0].samples[0]._replace(value=value)
        found[0].samples[:] = [sample]
        yield found[0]
