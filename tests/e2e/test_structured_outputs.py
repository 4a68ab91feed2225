"""Structured outputs against a real tritonserver, through each way in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import tritonclient.grpc as triton_grpc
from dllm_client import Client
from openai import OpenAI
from typer.testing import CliRunner

from launcher.program import app
from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import Answer, post, tensors
from tests.support.servers import AdapterServer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "grün"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["color", "count"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
ASK: Any = [{"role": "user", "content": "which?"}]
LENGTH = 64


@pytest.fixture(scope="module")
def client(adapter: AdapterServer) -> Iterator[OpenAI]:
    """OpenAI's client for Python."""
    with OpenAI(base_url=f"{adapter.url}/v1", api_key="-", max_retries=0) as opened:
        yield opened


def check(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


def test_a_form_holds_at_triton(triton: TritonServer) -> None:
    """The input `structured_outputs` is JSON text; the answer has the form and ends."""
    fields = {
        "text_input": "which?", "gen_length": LENGTH, "temperature": 1.0,
        "structured_outputs": json.dumps({"json": SCHEMA}),
    }  # fmt: skip
    with triton_grpc.InferenceServerClient(triton.grpc_url) as server:
        result = server.infer("dllm_unary", tensors(triton, triton_grpc, fields))
    answer = Answer.from_result(result)
    check(answer.text)
    assert answer.finish_reason == "stop"


def test_a_form_holds_at_the_adapter(adapter: AdapterServer, client: OpenAI) -> None:
    """`/v1/generate`, a chat and its stream have the form, and end."""
    wanted: Any = {"structured_outputs": {"json": SCHEMA}}
    with Client(adapter.url) as native:
        answer = native.wait(native.submit("which?", gen_length=LENGTH, **wanted))
    check(answer.text)
    assert answer.finish_reason == "stop"
    ask: Any = {
        "model": "dllm", "messages": ASK, "max_tokens": LENGTH, "response_format": FORMAT, "seed": 3
    }  # fmt: skip
    choice = client.chat.completions.create(**ask).choices[0]
    check(choice.message.content or "")
    assert choice.finish_reason == "stop"
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content


def test_a_form_holds_at_the_command_line(adapter: AdapterServer, tmp_path: Path) -> None:
    """`dllm generate --json-schema FILE` prints a text that is valid under the file's schema."""
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    command = ["generate", "which?", "--json-schema", str(path), "--gen-length", str(LENGTH)]
    outcome = CliRunner().invoke(app, command, env={"DLLM_URL": adapter.url})
    assert outcome.exit_code == 0, outcome.output
    check(outcome.stdout)


@pytest.mark.parametrize(
    ("schema", "length", "words"),
    [
        ({"type": "string", "pattern": "(a|b)*a(a|b){20}"}, LENGTH, "too large"),
        (SCHEMA, 4, "the shortest text has"),
        ({"type": "object", "unknown": 1}, LENGTH, "unknown"),
        ({"allOf": [{"minimum": 1}, {"minimum": "x"}]}, LENGTH, "minimum"),
    ],
    ids=["hostile", "long", "keyword", "malformed"],
)
def test_a_refused_form_is_the_callers_error(
    triton: TritonServer,
    adapter: AdapterServer,
    client: OpenAI,
    schema: Any,
    length: int,
    words: str,
) -> None:
    """A form that cannot be held is refused at each way in, with the field and the reason."""
    wanted = {"json": schema}
    fields = {"text_input": "x", "gen_length": length, "structured_outputs": json.dumps(wanted)}
    response = post(triton, fields)
    assert "structured_outputs" in response.json()["error"]
    assert words in response.json()["error"]
    body = {"prompt": "x", "gen_length": length, "structured_outputs": wanted}
    answer = httpx.post(f"{adapter.url}/v1/generate", json=body, timeout=60)
    assert answer.status_code == 422, answer.text  # as all wrong fields of this call
    assert "structured_outputs" in answer.text
    assert words in answer.text
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(
            model="dllm", messages=ASK, max_tokens=length, response_format=form
        )
