"""The engine's figures as Triton custom metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils
from dllm_engine import EngineStats, EngineThread
from dllm_engine.loop.histograms import Histogram, Histograms

#: Fields of the memory plan that are exported.
MEMORY_USES = ("limit", "weights", "requests", "activations", "logits", "graphs", "pages")


class Metrics:
    """The engine's figures as Triton custom metrics, each instance's under its own name."""

    _TOTALS = (
        ("dllm_steps_total", "Denoising steps run", "steps"),
        ("dllm_step_seconds_total", "Seconds spent in denoising steps", "step_seconds"),
        ("dllm_forward_passes_total", "Sequences pushed through the model", "forward_passes"),
        ("dllm_refreshes_total", "Steps of a request with its whole sequence", "refreshes"),
        ("dllm_batched_tokens_total", "Rows pushed through the model", "batched_tokens"),
        ("dllm_completion_tokens_total", "Tokens of ended answers", "completion_tokens"),
        ("dllm_requests_admitted_total", "Requests that began to run", "requests_admitted"),
        ("dllm_queue_seconds_total", "Seconds that these had waited", "queue_seconds"),
        ("dllm_preemptions_total", "Requests that gave their pages to others", "preemptions"),
        (
            "dllm_prefix_cache_queries_total",
            "Prompt tokens looked up in the prefix cache",
            "prefix_cache_queries",
        ),
        ("dllm_prefix_cache_hits_total", "Prompt tokens found there", "prefix_cache_hits"),
        ("dllm_requests_finished_total", "Requests answered", "requests_finished"),
        ("dllm_requests_cancelled_total", "Requests cancelled", "requests_cancelled"),
        ("dllm_requests_failed_total", "Requests failed", "requests_failed"),
    )

    _HISTOGRAMS = (
        ("dllm_request_queue_time_seconds", "From arrival to a place", "queue_time"),
        ("dllm_time_to_first_token_seconds", "To the first final token", "time_to_first_token"),
        ("dllm_time_per_output_token_seconds", "Per token of an answer", "time_per_output_token"),
        ("dllm_e2e_request_latency_seconds", "From arrival to the end", "e2e_latency"),
        ("dllm_step_duration_seconds", "Time of a denoising step", "step_time"),
        ("dllm_step_requests", "Requests in a denoising step", "step_requests"),
    )

    def __init__(self, model: str, instance: str) -> None:
        labels = {"model": model, "instance": instance}

        def metric(name: str, description: str, kind: int) -> Any:
            family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
            self._families.append(family)  # a family must outlive its metrics
            return family.Metric(labels=labels)

        self._families: list[Any] = []
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        self._totals = {field: metric(name, text, counter) for name, text, field in self._TOTALS}
        self._running = metric("dllm_running_requests", "Requests taking steps", gauge)
        self._waiting = metric("dllm_waiting_requests", "Requests waiting for a place", gauge)
        self._capacity = metric("dllm_max_running_requests", "Most requests at once", gauge)
        self._pages = metric("dllm_used_pages", "Pages of keys and values in use", gauge)
        self._cached = metric(
            "dllm_prefix_cache_pages", "Pages that the prefix cache has, in use or free", gauge
        )
        self._all_pages = metric("dllm_pages", "Pages of keys and values", gauge)
        memory = pb_utils.MetricFamily(
            name="dllm_memory_bytes", description="The memory plan, by use", kind=gauge
        )
        self._families.append(memory)
        self._memory = {use: memory.Metric(labels={**labels, "use": use}) for use in MEMORY_USES}
        self._last = EngineStats()
        self._histograms = {
            field: _HistogramMetric(name, text, labels, getattr(Histograms(), field).ends)
            for name, text, field in self._HISTOGRAMS
        }

    def close(self) -> None:
        """Take the metrics off the page; call it after the last publication.

        Python would destroy them only after the stub has let go of the memory it shares with the
        server, and crash.
        """
        self._totals.clear()
        self._memory.clear()
        self._histograms.clear()
        del self._running, self._waiting, self._capacity, self._pages, self._cached
        del self._all_pages
        self._families.clear()

    def publish(self, worker: EngineThread) -> None:
        """Bring the published figures up to date."""
        now = dataclasses.replace(worker.engine.stats)
        for field, metric in self._totals.items():
            metric.increment(getattr(now, field) - getattr(self._last, field))
        self._last = now
        for field, histogram in self._histograms.items():
            histogram.publish(getattr(worker.engine.histograms, field))
        self._running.set(len(worker.engine.scheduler.running))
        self._waiting.set(len(worker.engine.scheduler.waiting))
        self._capacity.set(worker.engine.config.max_num_seqs)
        self._pages.set(worker.engine.allocator.num_used)
        self._cached.set(worker.engine.allocator.num_cached)
        plan = worker.engine.runner.plan
        self._all_pages.set(plan.num_pages)
        for use, gauge in self._memory.items():
            gauge.set(getattr(plan, use))


class _HistogramMetric:
    """A histogram made of counters: this generation of Triton has no such kind of metric."""

    def __init__(
        self, name: str, description: str, labels: Mapping[str, str], ends: Sequence[float]
    ) -> None:
        self._families: list[Any] = []

        def counter(suffix: str) -> Any:
            family = pb_utils.MetricFamily(
                name=f"{name}_{suffix}",
                description=description,
                kind=pb_utils.MetricFamily.COUNTER,
            )
            self._families.append(family)
            return family

        bucket = counter("bucket")
        marks = ["+Inf" if math.isinf(end) else f"{end:g}" for end in ends]
        self._buckets = [bucket.Metric(labels={**labels, "le": mark}) for mark in marks]
        self._count, self._sum = (counter(part).Metric(labels=labels) for part in ("count", "sum"))
        self._last, self._last_sum = [0] * len(marks), 0.0

    def publish(self, histogram: Histogram) -> None:
        """Add what was observed since the last time."""
        now, total = histogram.cumulative, histogram.sum
        for metric, value, before in zip(
            (*self._buckets, self._count),
            (*now, now[-1]),
            (*self._last, self._last[-1]),
            strict=True,
        ):
            if value > before:  # each call is a round trip to the server
                metric.increment(value - before)
        self._sum.increment(total - self._last_sum)
        self._last, self._last_sum = now, total
