"""Several workers behind one port."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import requests
from dllm_engine import LLM, SamplingParams

from tests.support.servers import AdapterServer


def test_any_worker_answers_for_any_job(adapter_workers: AdapterServer, llm: LLM) -> None:
    """With four workers every job can be polled at once over whatever connection comes next."""
    assert len(adapter_workers.worker_processes()) == 4
    prompts = [f"prompt {i}" for i in range(40)]
    sampling = SamplingParams(gen_length=16)
    expected = llm.generate(prompts, sampling, chat=True, progress=False)
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda p: adapter_workers.submit(p, gen_length=16), prompts))
        # Each poll is a new connection, which the kernel hands to any of the workers.
        first = list(pool.map(adapter_workers.result, jobs))
        texts = list(pool.map(adapter_workers.finished, jobs))
    assert len(set(jobs)) == 40
    assert {str(body["status"]) for body in first} <= {"running", "finished"}
    assert texts == [one.text for one in expected]
    for _ in range(8):
        assert [adapter_workers.result(job)["text"] for job in jobs[:8]] == texts[:8]


def test_held_polls_end_at_every_worker(adapter_workers: AdapterServer) -> None:
    """Whichever worker holds a poll, it is answered when another one has finished the job."""
    job = adapter_workers.submit("hello", gen_length=200, ignore_eos=True)

    def held(_: int) -> dict[str, object]:
        answer = requests.get(
            f"{adapter_workers.url}/v1/result/{job}", params={"wait": 60}, timeout=90
        )
        body: dict[str, object] = answer.json()
        return body

    with ThreadPoolExecutor(12) as pool:
        polls = list(pool.map(held, range(12)))
    assert {str(body["status"]) for body in polls} == {"finished"}
