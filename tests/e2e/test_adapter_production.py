"""What operators rely on: keys, deadlines, metrics of all workers, ids that reach the engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import requests

from adapter.auth.keys import entry_of
from launcher.tritonserver import TritonServer
from tests.conftest import StartAdapter
from tests.support.servers import AdapterServer, eventually, metric, settled_counters


def sample(adapter: AdapterServer, name: str, labels: str = "") -> float:
    """The value of a metric, from whichever worker answers."""
    page = requests.get(f"{adapter.url}/metrics", timeout=30).text
    found = re.search(rf"^dllm_adapter_{name}{re.escape(labels)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics_are_those_of_all_workers(start_adapter: StartAdapter) -> None:
    """Whichever worker is asked, it tells what all have done, and the dead among them too."""
    adapter = start_adapter(workers=3)
    jobs = [adapter.submit(f"prompt {n}", gen_length=8) for n in range(30)]
    for job in jobs:
        adapter.finished(job)
    for _ in range(6):
        assert sample(adapter, "jobs_submitted_total", '{model="dllm"}') == 30
        assert sample(adapter, "jobs_settled_total", '{outcome="finished"}') == 30
        assert sample(adapter, "tokens_total", '{kind="completion",model="dllm"}') > 0
    victim = adapter.worker_processes()[0]
    victim.kill()
    victim.wait(30)
    eventually(lambda: len(adapter.worker_processes()) == 3, "uvicorn has started another")
    eventually(lambda: adapter.health() == 200, "it answers")
    assert sample(adapter, "jobs_submitted_total", '{model="dllm"}') == 30
    assert sample(adapter, "inflight_requests", '{model="dllm"}') == 0


def test_deadline_ends_a_job_in_the_engine(
    start_adapter: StartAdapter, triton: TritonServer
) -> None:
    """A job that takes too long fails with the time, and its place in the engine is free again."""
    adapter = start_adapter()
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "the engine is idle")
    # Long enough for both to get there; run to their end they take twice as long.
    before = metric(triton, "dllm_requests_cancelled_total")
    jobs = adapter.submit_batch(["a", "b"], timeout=2, gen_length=512, ignore_eos=True)
    for job in jobs:
        eventually(lambda: adapter.result(job)["status"] != "running", "the job is over")  # noqa: B023
        body = adapter.result(job)
        assert (body["status"], body["error"]) == (
            "failed",
            "timeout: the job was not done within 2 s",
        )
    eventually(lambda: metric(triton, "dllm_requests_cancelled_total") == before + 2, "cancelled")
    assert adapter.finished(adapter.submit("a", timeout=60, gen_length=8)) is not None


def test_keys_of_a_file_are_exchanged_while_all_workers_run(
    start_adapter: StartAdapter, tmp_path: Path
) -> None:
    """A new key works at every worker as soon as it is in the file, and the old one no more."""
    keys = tmp_path / "keys"
    keys.write_text(f"{entry_of('team', 'old')}\n")
    adapter = start_adapter(workers=2, DLLM_API_KEYS_FILE=str(keys))

    def statuses(key: str) -> set[int]:
        body = {"prompt": "a", "gen_length": 8}
        headers = {"Authorization": f"Bearer {key}"}
        call = f"{adapter.url}/v1/generate"
        return {
            requests.post(call, json=body, headers=headers, timeout=30).status_code
            for _ in range(12)
        }

    assert (statuses("old"), statuses("new")) == ({200}, {401})
    keys.write_text(f"{entry_of('team', 'new')}\n# {entry_of('team', 'old')}\n")
    assert (statuses("old"), statuses("new")) == ({401}, {200})


def test_rate_limit_holds_over_all_workers(start_adapter: StartAdapter) -> None:
    """Workers count together, however connections are spread over them."""
    adapter = start_adapter(workers=3, DLLM_RATE_LIMIT="10/hour")
    body = {"prompt": "a", "gen_length": 8}
    answers = [
        requests.post(f"{adapter.url}/v1/generate", json=body, timeout=30).status_code
        for _ in range(24)
    ]
    assert answers == [200] * 10 + [429] * 14


def test_trace_context_does_not_disturb_triton(start_adapter: StartAdapter) -> None:
    """A caller's trace context travels to Triton with the request, which is answered as ever."""
    adapter = start_adapter()
    headers = {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "X-Request-ID": "order-7",
    }
    body = {"prompt": "a", "gen_length": 8}
    answer = requests.post(f"{adapter.url}/v1/generate", json=body, headers=headers, timeout=30)
    assert answer.headers["x-request-id"] == "order-7"
    assert adapter.finished(answer.json()["request_ids"][0]) is not None
    bad = {**body, "remasking": "best"}
    for call in ("generate", "generate/stream"):
        answer = requests.post(f"{adapter.url}/v1/{call}", json=bad, headers=headers, timeout=30)
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "remasking"]


@pytest.mark.parametrize(("drain", "cancelled"), [("60", 0), ("0", 1)])
def test_sigterm_lets_running_jobs_finish_or_gives_them_back(
    start_adapter: StartAdapter, triton: TritonServer, drain: str, cancelled: int
) -> None:
    """On SIGTERM a worker finishes its running jobs, or releases them for the next worker."""
    adapter = start_adapter(DLLM_DRAIN_SECONDS=drain)
    before = settled_counters(triton)
    # Long enough to be seen in the metrics, which are published once a second.
    job = adapter.submit("a long one", gen_length=320, cfg_scale=1.0, ignore_eos=True)
    eventually(lambda: metric(triton, "dllm_running_requests") == 1, "it runs")
    adapter.stop()
    adapter.start()
    adapter.finished(job)
    after = settled_counters(triton)
    assert after["dllm_requests_finished_total"] == before["dllm_requests_finished_total"] + 1
    assert after["dllm_requests_cancelled_total"] == (
        before["dllm_requests_cancelled_total"] + cancelled
    )
