"""The REST API as the deployment guide has it, and what was added to it."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import requests
from dllm_engine import LLM, SamplingParams

from launcher.tritonserver import TritonServer
from tests.conftest import StartAdapter
from tests.support.servers import AdapterServer, eventually, metric, settled_counters


def generate_text(prompt: str, base_url: str) -> str:
    """A client as the deployment guide describes it: submit, poll every 100 ms, return the text."""
    submitted = requests.post(
        f"{base_url}/v1/generate", json={"prompt": prompt, "temperature": 0.6, "gen_length": 128}
    )
    request_id = submitted.json()["request_ids"][0]
    while True:
        job = requests.get(f"{base_url}/v1/result/{request_id}").json()
        if job["status"] == "finished":
            return str(job["text"])
        assert job["status"] == "running", job
        time.sleep(0.1)


def generate_texts(prompts: list[str], base_url: str) -> list[str]:
    """The same for a batch."""
    submitted = requests.post(
        f"{base_url}/v1/generate_batch",
        json={"prompts": prompts, "temperature": 0.0, "gen_length": 64},
    )
    texts = []
    for request_id in submitted.json()["request_ids"]:
        while (job := requests.get(f"{base_url}/v1/result/{request_id}").json())[
            "status"
        ] != "finished":
            assert job["status"] == "running", job
            time.sleep(0.1)
        texts.append(str(job["text"]))
    return texts


def asked_in_process(llm: LLM, prompts: list[str], **params: Any) -> list[str]:
    """What the engine answers when it is asked directly, as by a user in a chat."""
    sampling = SamplingParams(**params)
    return [one.text for one in llm.generate(prompts, sampling, chat=True, progress=False)]


def test_guides_client(adapter: AdapterServer) -> None:
    """A client written for the deployment guide gets its text."""
    assert generate_text("Tell me about machine learning", adapter.url)


def test_guides_batch_client(adapter: AdapterServer, llm: LLM) -> None:
    """A batch client written for the guide gets the texts in the order of its prompts."""
    prompts = [f"Prompt {i}" for i in range(1, 6)]
    expected = asked_in_process(llm, prompts, gen_length=64)
    assert generate_texts(prompts, adapter.url) == expected


def test_exact_shapes(start_adapter: StartAdapter) -> None:
    """Every call of the contract answers with exactly these bodies; ids count up from 0."""
    url = f"{start_adapter().url}/v1"
    assert requests.get(f"{url}/health").json()["status"] == "ok"

    one = requests.post(f"{url}/generate", json={"prompt": "Tell me", "gen_length": 8})
    assert (one.status_code, one.json()) == (200, {"request_ids": [0], "status": "submitted"})
    two = requests.post(f"{url}/generate_batch", json={"prompts": ["a", "b"], "gen_length": 8})
    assert (two.status_code, two.json()) == (200, {"request_ids": [1, 2], "status": "submitted"})

    long = {"prompt": "x", "gen_length": 512, "cfg_scale": 1.0, "ignore_eos": True}
    assert requests.post(f"{url}/generate", json=long).json()["request_ids"] == [3]
    running = requests.get(f"{url}/result/3")
    assert running.status_code == 200
    assert running.json() == {"request_id": 3, "status": "running", "text": None}

    for request_id in range(3):
        done = requests.get(f"{url}/result/{request_id}", params={"wait": 60}).json()
        text = done.pop("text")
        assert isinstance(text, str)
        assert done["status"] == "finished"
        assert done["finish_reason"] in ("stop", "length")
        assert done["usage"]["forward_passes"] > 0
        assert done["created_at"] <= done["started_at"] <= done["finished_at"]

    cancelled = requests.delete(f"{url}/result/3")
    assert cancelled.status_code == 200
    expected = {"request_id": 3, "status": "cancelled", "text": None}
    assert expected.items() <= cancelled.json().items()
    late = {"prompt": "x", "gen_length": 512, "ignore_eos": True, "timeout": 0.001}
    assert requests.post(f"{url}/generate", json=late).json()["request_ids"] == [4]
    failed = requests.get(f"{url}/result/4", params={"wait": 60}).json()
    assert "timeout" in failed.pop("error")
    assert (failed["status"], failed["text"]) == ("failed", None)


@pytest.mark.parametrize("request_id", ["999999", "-1", "9" * 30])
@pytest.mark.parametrize("method", ["get", "delete"])
def test_unknown_id(adapter: AdapterServer, method: str, request_id: str) -> None:
    """An id that was never given out is a 404."""
    response = requests.request(method, f"{adapter.url}/v1/result/{request_id}", timeout=30)
    assert response.status_code == 404
    assert response.json().keys() == {"detail"}


def test_wait_holds_the_poll(adapter: AdapterServer) -> None:
    """With `wait` a poll answers when the job is done, or when the time is over."""
    job = adapter.submit("hello", gen_length=512, cfg_scale=1.0, ignore_eos=True)
    url = f"{adapter.url}/v1/result/{job}"
    assert requests.get(url, params={"wait": 0.2}).json()["status"] == "running"
    requests.delete(url)
    quick = adapter.submit("hello", gen_length=32)
    url = f"{adapter.url}/v1/result/{quick}"
    assert requests.get(url, params={"wait": 60}).json()["status"] == "finished"
    assert requests.get(url, params={"wait": 3600}).status_code == 422


INVALID: list[tuple[str, dict[str, Any], str, str]] = [
    ("generate", {}, "prompt", ""),
    ("generate", {"prompt": ""}, "prompt", "1"),
    ("generate", {"prompt": "x" * 4097}, "prompt", "4096"),
    ("generate", {"prompt": 5}, "prompt", "string"),
    ("generate", {"prompt": "x", "temperature": -0.1}, "temperature", "0"),
    ("generate", {"prompt": "x", "temperature": 2.1}, "temperature", "2"),
    ("generate", {"prompt": "x", "temperature": "hot"}, "temperature", "number"),
    ("generate", {"prompt": "x", "gen_length": 0}, "gen_length", "1"),
    ("generate", {"prompt": "x", "gen_length": 513}, "gen_length", "512"),
    ("generate", {"prompt": "x", "gen_length": "8"}, "gen_length", "integer"),
    ("generate", {"prompt": "x", "max_tokens": 8}, "max_tokens", ""),
    ("generate", {"prompt": "x", "stream": True}, "stream", ""),
    ("generate", {"prompt": "x", "top_p": 1.5}, "top_p", "1"),
    ("generate", {"prompt": "x", "block_length": 33}, "block_length", "32"),
    ("generate_batch", {"prompts": []}, "prompts", "1"),
    ("generate_batch", {"prompts": ["x"] * 65}, "prompts", "64"),
    ("generate_batch", {"prompts": ["x", ""]}, "prompts", "1"),
    ("generate_batch", {"prompts": ["x", "x" * 4097]}, "prompts", "4096"),
    ("generate_batch", {"prompts": ["x"], "gen_length": 513}, "gen_length", "512"),
    ("generate_batch", {"prompts": ["x"], "prompt": "y"}, "prompt", ""),
]


@pytest.mark.parametrize(("call", "body", "field", "limit"), INVALID)
def test_invalid_body(
    adapter: AdapterServer, call: str, body: dict[str, Any], field: str, limit: str
) -> None:
    """A body that breaks a limit, or says what we do not know, is a 422 that names both."""
    response = requests.post(f"{adapter.url}/v1/{call}", json=body, timeout=30)
    assert response.status_code == 422
    problems = response.json()["detail"]
    named = [p for p in problems if field in p["loc"] or field in p["msg"]]
    assert named, problems
    assert any(limit in problem["msg"] for problem in named), problems


def test_batch_is_all_or_nothing(adapter: AdapterServer) -> None:
    """A batch with one bad prompt queues none: the next job gets the next id."""
    before = adapter.submit("x", gen_length=1)
    body = {"prompts": ["good", ""]}
    refused = requests.post(f"{adapter.url}/v1/generate_batch", json=body, timeout=30)
    assert refused.status_code == 422
    assert adapter.submit("x", gen_length=1) == before + 1


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"remasking": "best"}, "remasking", "must be one of low_confidence"),
        ({"cache": "huge"}, "cache", "must be one of none"),
        ({"steps": 1}, "steps", "must be at least the number of blocks, 2"),
        ({"prompt": "x" * 1000}, "gen_length", "prompt .* plus .* must be at most 1024"),
        ({"prompt": None, "input_ids": [512]}, "input_ids", "ids must lie in 0..511"),
        ({"factor": 1.0, "entropy_bound": 1.0}, "entropy_bound", "cannot be combined with factor"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_at_submission(
    adapter: AdapterServer, fields: dict[str, Any], field: str, reason: str
) -> None:
    """Context, vocabulary, steps, rules: a 422 in the engine's words, and no job."""
    before = adapter.submit("x", gen_length=1)
    body = {"prompt": "hello", "gen_length": 64} | fields
    refused = requests.post(f"{adapter.url}/v1/generate", json=body, timeout=30)
    assert refused.status_code == 422
    [problem] = refused.json()["detail"]
    assert problem["loc"] == ["body", field]
    assert re.match(reason, problem["msg"])
    assert adapter.submit("x", gen_length=1) == before + 1


def test_long_prompt_of_a_batch_is_named(adapter: AdapterServer) -> None:
    """An error names the prompt of a batch that does not fit, and nothing is queued."""
    before = adapter.submit("x", gen_length=1)
    body = {"prompts": ["short", "x" * 2000], "gen_length": 500}
    refused = requests.post(f"{adapter.url}/v1/generate_batch", json=body, timeout=30)
    assert refused.status_code == 422
    [problem] = refused.json()["detail"]
    assert problem["loc"] == ["body", "prompts", 1]
    assert problem["msg"].startswith("gen_length: prompt (")
    assert adapter.submit("x", gen_length=1) == before + 1


def test_sampling_reaches_the_engine(adapter: AdapterServer, llm: LLM) -> None:
    """A job gets the very text that the engine makes in this process from the same fields."""
    for params in (
        {"gen_length": 8},
        {"gen_length": 40, "block_length": 8, "steps": 20},
        {"gen_length": 24, "cfg_scale": 1.5},
        {"gen_length": 32, "confidence_threshold": 0.3},
        {"gen_length": 24, "temperature": 1.0, "seed": 7, "top_k": 5, "top_p": 0.9},
        {"gen_length": 24, "temperature": 0.5, "seed": -8, "remasking": "random"},
    ):
        [expected] = asked_in_process(llm, ["a prompt"], **params)
        assert adapter.finished(adapter.submit("a prompt", **params)) == expected


def test_raw_prompt(adapter: AdapterServer, llm: LLM) -> None:
    """With `raw` the model sees the prompt as it is, without the chat template."""
    sampling = SamplingParams(gen_length=24)
    [expected] = llm.generate(["as it is"], sampling, progress=False)
    assert adapter.finished(adapter.submit("as it is", gen_length=24, raw=True)) == expected.text


def test_seed_fixes_the_text(adapter: AdapterServer) -> None:
    """The same prompt and seed give the same text; without a seed texts differ."""
    fields = {"temperature": 1.0, "gen_length": 48}
    seeded = adapter.submit_batch(["hello"] * 2, **fields, seed=99)
    free = adapter.submit_batch(["hello"] * 2, **fields)
    texts = [adapter.finished(job) for job in seeded + free]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_stop_string_cuts(adapter: AdapterServer) -> None:
    """The text ends before the first stop string."""
    fields = {"gen_length": 48, "ignore_eos": True}
    whole = adapter.finished(adapter.submit("count", **fields))
    stop = whole[len(whole) // 2]
    cut = adapter.finished(adapter.submit("count", **fields, stop=[stop]))
    assert cut == whole[: whole.index(stop)]


def test_delete_cancels(adapter: AdapterServer, triton: TritonServer) -> None:
    """DELETE ends a running job and frees its place in the engine; a finished job stays."""
    cancelled = settled_counters(triton)["dllm_requests_cancelled_total"]
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "the engine is idle")
    job = adapter.submit("hello", gen_length=512, cfg_scale=1.0, ignore_eos=True)
    eventually(lambda: metric(triton, "dllm_running_requests") > 0, "the job runs")
    answer = requests.delete(f"{adapter.url}/v1/result/{job}", timeout=30)
    expected = {"request_id": job, "status": "cancelled", "text": None}
    assert expected.items() <= answer.json().items()
    eventually(
        lambda: metric(triton, "dllm_requests_cancelled_total") > cancelled, "the engine is told"
    )
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "its place is free")
    assert expected.items() <= adapter.result(job).items()

    done = adapter.submit("hello", gen_length=4)
    text = adapter.finished(done)
    answer = requests.delete(f"{adapter.url}/v1/result/{done}", timeout=30)
    assert (answer.json()["status"], answer.json()["text"]) == ("finished", text)
