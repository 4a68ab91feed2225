"""The engine's figures on Triton's metrics port."""

from __future__ import annotations

import re
from pathlib import Path

import requests

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import LONG, GrpcStream, generate, post
from tests.support.servers import COUNTERS, eventually, metric, settled_counters, triton_server


def page(server: TritonServer) -> str:
    return requests.get(server.metrics_url, timeout=30).text


def test_counters_count(triton: TritonServer) -> None:
    """One request moves steps, passes, tokens and requests by what its usage says."""
    before = settled_counters(triton)
    answer = generate(
        triton, text_input="count me", gen_length=32, steps=16, cfg_scale=1.0, ignore_eos=True
    )
    after = settled_counters(triton)
    moved = {name: after[name] - before[name] for name in COUNTERS}
    assert answer.usage == (len("count me"), 32, 16, 32, 0)
    assert moved.pop("dllm_step_seconds_total") > 0
    assert moved.pop("dllm_batched_tokens_total") >= 32
    assert moved == {
        "dllm_steps_total": 16,
        "dllm_refreshes_total": 16,
        "dllm_forward_passes_total": 32,
        "dllm_completion_tokens_total": 32,
        "dllm_requests_finished_total": 1,
        "dllm_requests_cancelled_total": 0,
        "dllm_requests_failed_total": 0,
    }


def test_gauges_show_the_present(triton: TritonServer) -> None:
    """The gauges show how many requests run now, and how many may."""
    assert metric(triton, "dllm_max_running_requests") == 64
    assert metric(triton, "dllm_pages") > 0
    assert metric(triton, "dllm_used_pages") == 0
    assert metric(triton, "dllm_prefix_cache_pages") == 0
    for use in ("limit", "weights", "requests", "activations", "logits", "pages"):
        assert metric(triton, "dllm_memory_bytes", use=use) > 0
    with GrpcStream(triton, LONG) as _one, GrpcStream(triton, LONG) as _two:
        eventually(lambda: metric(triton, "dllm_running_requests") == 2, "two requests run")
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "none runs")


def test_refusals_are_not_counted(triton: TritonServer) -> None:
    """A refused request never reaches the engine, and moves none of its counters."""
    before = settled_counters(triton)
    assert post(triton, {"text_input": "hi", "steps": 0}).status_code == 400
    assert settled_counters(triton) == before


def test_metrics_leave_with_the_model(checkpoint: Path) -> None:
    """A model that is unloaded takes its metrics off the page, and brings them back.

    On a server of its own: Triton keeps what a killed process of the model had counted.
    """
    control = ["--model-control-mode=explicit", "--load-model=dllm"]
    with triton_server(checkpoint, extra_args=[*control, "--load-model=dllm_unary"]) as server:
        repository = f"http://{server.http_url}/v2/repository/models/dllm"
        assert metric(server, "dllm_max_running_requests") == 64
        assert requests.post(f"{repository}/unload", timeout=60).status_code == 200
        eventually(lambda: "dllm_max_running_requests{" not in page(server), "its metrics are gone")
        assert requests.post(f"{repository}/load", timeout=60).status_code == 200
        generate(server, text_input="again", gen_length=8)
        eventually(lambda: metric(server, "dllm_requests_finished_total") == 1, "it counts afresh")


def test_histograms_count_what_the_counters_count(triton: TritonServer) -> None:
    """Each answer is in one bucket of every histogram of requests, each step in those of steps."""
    before = histograms(triton)
    answer = generate(triton, text_input="time me", gen_length=32, steps=16, ignore_eos=True)
    settled_counters(triton)
    after = histograms(triton)
    moved = {key: value - before.get(key, 0) for key, value in after.items()}
    for name, count in (
        ("dllm_request_queue_time_seconds", 1),
        ("dllm_time_to_first_token_seconds", 1),
        ("dllm_time_per_output_token_seconds", 1),
        ("dllm_e2e_request_latency_seconds", 1),
        ("dllm_step_duration_seconds", answer.usage[2]),
        ("dllm_step_requests", answer.usage[2]),
    ):
        buckets = [value for key, value in moved.items() if key.startswith(f"{name}_bucket")]
        assert moved[f"{name}_count"] == buckets[-1] == count
        assert buckets == sorted(buckets)
        assert moved[f"{name}_sum"] > 0
    assert moved["dllm_step_requests_sum"] == answer.usage[2]
    seconds = moved["dllm_time_per_output_token_seconds_sum"] * 32
    assert seconds <= moved["dllm_e2e_request_latency_seconds_sum"]
    assert (
        moved["dllm_time_to_first_token_seconds_sum"]
        < moved["dllm_e2e_request_latency_seconds_sum"]
    )


def histograms(server: TritonServer) -> dict[str, float]:
    """Every part of every histogram by name, buckets also by their end, in order of the ends."""
    pattern = r'^(dllm_\w+_(?:bucket|count|sum))\{[^}]*?(?:le="([^"]+)")?[^}]*\} (\S+)$'
    found = re.findall(pattern, page(server), re.MULTILINE)
    parts = [(name, float(end or 0), float(value)) for name, end, value in found]
    return {f"{name} {end}": value for name, end, value in sorted(parts) if "bucket" in name} | {
        name: value for name, _, value in parts if "bucket" not in name
    }
