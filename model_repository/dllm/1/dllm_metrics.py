"""The engine's figures as Triton custom metrics."""

from __future__ import annotations

import dataclasses
from typing import Any

import triton_python_backend_utils as pb_utils
from dllm_engine import EngineStats, EngineThread

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
        ("dllm_requests_finished_total", "Requests answered", "requests_finished"),
        ("dllm_requests_cancelled_total", "Requests cancelled", "requests_cancelled"),
        ("dllm_requests_failed_total", "Requests failed", "requests_failed"),
    )

    def __init__(self, instance: str) -> None:
        labels = {"model": "dllm", "instance": instance}

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
        self._all_pages = metric("dllm_pages", "Pages of keys and values", gauge)
        memory = pb_utils.MetricFamily(
            name="dllm_memory_bytes", description="The memory plan, by use", kind=gauge
        )
        self._families.append(memory)
        self._memory = {use: memory.Metric(labels={**labels, "use": use}) for use in MEMORY_USES}
        self._last = EngineStats()

    def close(self) -> None:
        """Take the metrics off the page; call it after the last publication.

        Python would destroy them only after the stub has let go of the memory it shares with the
        server, and crash.
        """
        self._totals.clear()
        self._memory.clear()
        del self._running, self._waiting, self._capacity, self._pages, self._all_pages
        self._families.clear()

    def publish(self, worker: EngineThread) -> None:
        """Bring the published figures up to date."""
        now = dataclasses.replace(worker.engine.stats)
        for field, metric in self._totals.items():
            metric.increment(getattr(now, field) - getattr(self._last, field))
        self._last = now
        self._running.set(worker.engine.scheduler.num_running)
        self._waiting.set(worker.engine.scheduler.num_waiting)
        self._capacity.set(worker.engine.config.max_num_seqs)
        self._pages.set(worker.engine.allocator.num_used)
        plan = worker.engine.runner.plan
        self._all_pages.set(plan.num_pages)
        for use, gauge in self._memory.items():
            gauge.set(getattr(plan, use))
