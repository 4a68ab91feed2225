"""Watching a text being denoised, on the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import requests
from dllm_engine import LLM, SamplingParams

from launcher.tritonserver import TritonServer
from tests.support.servers import AdapterServer, eventually, metric, settled_counters

LONG = {"gen_length": 512, "ignore_eos": True}


@contextmanager
def open_stream(adapter: AdapterServer, **fields: Any) -> Iterator[Iterator[tuple[str, Any]]]:
    """The events of one call, as they arrive; leaving drops the connection."""
    body = {"prompt": "tell me"} | fields
    with requests.post(
        f"{adapter.url}/v1/generate/stream", json=body, stream=True, timeout=60
    ) as response:
        assert response.status_code == 200, response.text
        yield _events(response)


def _events(response: requests.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in response.iter_lines(chunk_size=1, decode_unicode=True):
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def test_stream_tells_the_whole_story(adapter: AdapterServer, llm: LLM) -> None:
    """Steps show each position committed once, for good, and what is final grows to the answer."""
    fields = {"gen_length": 24, "block_length": 8, "temperature": 0.7, "seed": 5}
    with open_stream(adapter, **fields, ignore_eos=True) as stream:
        *steps, (last, answer) = stream

    sampling = SamplingParams(**fields, ignore_eos=True)  # type: ignore[arg-type]
    [expected] = llm.generate(["tell me"], sampling, chat=True, progress=False)
    assert last == "done"
    assert (answer["text"], answer["seed"]) == (expected.text, 5)
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == answer["usage"]["steps"] == 24

    assert {name for name, _ in steps} == {"step"}
    shown = [data for _, data in steps]
    committed = [one for data in shown for one in data["committed"]]
    assert sorted(one["position"] for one in committed) == list(range(24))
    tokens = {one["position"]: one["token_id"] for one in committed}
    assert [tokens[i] for i in range(24)] == expected.token_ids.tolist()
    for before, after in pairwise(shown):
        assert before["step"] < after["step"]
        assert after["final_text"].startswith(before["final_text"])
        assert all(
            new is not None
            for old, new in zip(before["canvas"], after["canvas"], strict=True)
            if old
        )
    assert shown[-1]["final_text"] == answer["text"]


def test_engines_refusal_has_a_status(adapter: AdapterServer) -> None:
    """A refusal by the engine is a 422 that names the field, not a broken stream."""
    body = {"prompt": "a", "remasking": "best"}
    answer = requests.post(f"{adapter.url}/v1/generate/stream", json=body, timeout=60)

    assert answer.status_code == 422
    [problem] = answer.json()["detail"]
    assert problem["loc"] == ["body", "remasking"]


def test_hanging_up_frees_the_place(adapter: AdapterServer, triton: TritonServer) -> None:
    """A caller who drops the stream ends the request in the engine."""
    before = settled_counters(triton)
    with open_stream(adapter, **LONG) as stream:
        next(stream)
    eventually(
        lambda: (
            metric(triton, "dllm_requests_cancelled_total")
            == before["dllm_requests_cancelled_total"] + 1
        ),
        "the request is cancelled",
    )
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "its place is free")
    after = settled_counters(triton)
    assert after["dllm_requests_finished_total"] == before["dllm_requests_finished_total"]


def test_reader_that_sleeps_holds_up_nobody(adapter: AdapterServer, triton: TritonServer) -> None:
    """The engine finishes before its reader has read a word; others are served meanwhile."""
    finished = settled_counters(triton)["dllm_requests_finished_total"]
    with open_stream(adapter, **LONG | {"gen_length": 200}) as stream:
        adapter.finished(adapter.submit("somebody else", gen_length=8))
        eventually(
            lambda: metric(triton, "dllm_requests_finished_total") == finished + 2,
            "both are finished",
        )
        events = list(stream)
    positions = [one["position"] for _, data in events for one in data.get("committed", ())]
    assert sorted(positions) == list(range(200))
    assert events[-1][0] == "done"
