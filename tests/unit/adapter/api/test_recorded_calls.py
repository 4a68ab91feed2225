"""Calls of well-known clients, as tests/clients/recorded.json has them, against the whole app."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from adapter_fakes import RunningApp, ScriptedEngine, denoising, fast_settings, running_app

CLIENTS = Path(__file__).parents[3] / "clients"
CALLS: list[dict[str, Any]] = json.loads((CLIENTS / "recorded.json").read_text())
TEXT = "<0><1><2><3>"
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 4,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 2},
}
#: What a call may ask for under the engine's own name.
SAME_NAME = ("temperature", "top_p", "seed", "steps", "ignore_eos", "suffix")


ENGINE = ScriptedEngine([list(denoising(4))])


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine that writes four pieces, and has run nothing yet."""
    ENGINE.requests.clear()
    return ENGINE


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    """A worker that is ready."""
    database = tmp_path_factory.mktemp("recorded") / "jobs.db"
    settings = fast_settings(f"sqlite:///{database}", engine_idle_timeout=10)
    async with running_app(settings, ENGINE) as running:
        await wait_until_healthy(running)
        yield running


async def wait_until_healthy(running: RunningApp) -> None:
    """Wait for the worker's first look at the engine."""
    async with asyncio.timeout(10):
        while (await running.health())[0] != 200:
            await asyncio.sleep(0.005)


def chunks(answer: httpx.Response) -> list[Any]:
    """The chunks of a stream that ends as OpenAI's do."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def check_chat(answer: httpx.Response, _body: Any) -> None:
    """One message of the assistant, with its reason and the usage."""
    found = answer.json()
    (choice,) = found["choices"]
    assert (found["object"], found["model"], found["usage"]) == ("chat.completion", "dllm", USAGE)
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == TEXT
    assert choice["finish_reason"] == "length"


def check_text(answer: httpx.Response, body: Any) -> None:
    """One text for each prompt, in order."""
    found = answer.json()
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    assert found["object"] == "text_completion"
    assert [choice["index"] for choice in found["choices"]] == list(range(len(prompts)))
    assert {choice["text"] for choice in found["choices"]} == {TEXT}
    assert found["usage"]["completion_tokens"] == 4 * len(prompts)


def check_stream(answer: httpx.Response, body: Any, kind: str, piece: Callable[[Any], str]) -> None:
    """The pieces are the text, the last one has the reason, and usage comes only when asked for."""
    found = chunks(answer)
    assert {chunk["object"] for chunk in found} == {kind}
    if (body.get("stream_options") or {}).get("include_usage"):
        last = found.pop()
        assert (last["choices"], last["usage"]) == ([], USAGE)
    choices = [chunk["choices"][0] for chunk in found]
    assert "".join(piece(choice) for choice in choices) == TEXT
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert choices[-1]["finish_reason"] == "length"


def check_chat_stream(answer: httpx.Response, body: Any) -> None:
    """The first chunk names the assistant, and all together have the text."""
    assert chunks(answer)[0]["choices"][0]["delta"]["role"] == "assistant"
    check_stream(
        answer, body, "chat.completion.chunk", lambda choice: choice["delta"].get("content", "")
    )


def check_text_stream(answer: httpx.Response, body: Any) -> None:
    """All chunks together have the text."""
    check_stream(answer, body, "text_completion", lambda choice: choice["text"])


def check_response(answer: httpx.Response, _body: Any) -> None:
    """One message with the text."""
    found = answer.json()
    (message,) = found["output"]
    assert (found["object"], found["model"], found["status"]) == ("response", "dllm", "incomplete")
    assert message["content"][0]["text"] == TEXT


def check_response_stream(answer: httpx.Response, body: Any) -> None:
    """The deltas are the text, and the last event is the whole response."""
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines]
    assert "".join(event.get("delta", "") for event in events) == TEXT
    check_response(httpx.Response(200, json=events[-1]["response"]), body)


def check_models(answer: httpx.Response, _body: Any) -> None:
    """The list has the one model that is served."""
    assert [model["id"] for model in answer.json()["data"]] == ["dllm"]


def check_health(answer: httpx.Response, _body: Any) -> None:
    """The service is ready."""
    assert answer.json()["status"] == "ok"


ANSWERS: Mapping[str, Callable[[httpx.Response, Any], None]] = {
    "chat": check_chat,
    "chat stream": check_chat_stream,
    "text": check_text,
    "text stream": check_text_stream,
    "response": check_response,
    "response stream": check_response_stream,
    "models": check_models,
    "health": check_health,
}
ERRORS = {"refused": 400, "no such path": 404}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call['client']}: {call['does']}")
@pytest.mark.asyncio(loop_scope="module")
async def test_recorded_call(
    call: Mapping[str, Any], app: RunningApp, engine: ScriptedEngine
) -> None:
    """It gets the answer that its client reads, and the engine gets what it asks for."""
    method, path = call["call"].split()
    answer = await app.client.request(
        method, path, json=call["body"], headers=call.get("headers", {}), timeout=10
    )

    if call["answer"] in ERRORS:
        assert answer.status_code == ERRORS[call["answer"]], answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == call.get("param")
        assert path.removeprefix("/v1") in error["message"] or error["param"] in error["message"]
        assert engine.requests == []
        return
    assert answer.status_code == 200, answer.text
    ANSWERS[call["answer"]](answer, call["body"])
    for request in engine.requests:
        asked = {name: call["body"].get(name) for name in (*SAME_NAME, "stop")}
        for name, value in asked.items():
            if value not in (None, [], ""):
                assert request[name] == value, name


def test_the_page_of_clients_lists_each() -> None:
    """docs/clients.md has a row for each client and version, with how its calls are known."""
    rows = Counter()
    errors = Counter()
    for call in CALLS:
        key = (call["client"], call["package"], call["seen"])
        rows[key] += 1
        errors[key] += call["answer"] in ERRORS
    page = (CLIENTS.parents[1] / "docs/clients.md").read_text()
    table = "".join(
        f"| {' | '.join(key)} | {total - errors[key]} | {errors[key]} |\n"
        for key, total in sorted(rows.items())
    )
    assert f"|---|---|---|---|---|\n{table}\n" in page


def test_the_clients_that_run_have_the_recorded_versions() -> None:
    """The clients that run are those that the calls are from, to the version."""
    files = (CLIENTS / "requirements.txt", CLIENTS.parents[1] / "constraints.txt")
    lines = re.findall(r"^(\S+?)(?:\[.*\])?==(\S+)", "\n".join(f.read_text() for f in files), re.M)
    node = json.loads((CLIENTS / "package.json").read_text())["dependencies"]
    pinned = {f"{name} {version}" for name, version in (*lines, *node.items())}
    for call in CALLS:
        if call["seen"] == "run":
            assert set(call["package"].split(", ")) <= pinned
