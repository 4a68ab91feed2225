"""`/v1/responses`, through OpenAI's own client, whose types check what it gets."""

import json
from typing import Any

import openai
import pytest
from adapter_fakes import HANG, ScriptedEngine, denoising, until
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseOutputMessage
from openai_calls import post

from adapter.errors import EngineFailure
from adapter.types import Event, TokenDetail, Usage

PATH = "/responses"


def text_of(response: Response) -> str:
    """The text, of a response that OpenAI's types describe."""
    Response.model_validate(response.model_dump(by_alias=True, warnings="error"), strict=False)
    return response.output_text


async def test_a_string_is_answered(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """Input and instructions become messages; a full canvas is an incomplete response."""
    response = await client.responses.create(
        model="dllm",
        input="What is AI?",
        instructions="be brief",
        max_output_tokens=64,
        temperature=0.5,
        metadata={"run": "7"},
        store=True,
        extra_body={"block_length": 16, "priority": 1},
    )
    assert text_of(response) == "<0><1><2><3>"
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.metadata == {"run": "7"}
    assert response.model_extra is not None
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (3, 4, 7)
    assert usage.input_tokens_details.cached_tokens == 2
    (request,) = engine.requests
    assert json.loads(str(request["messages"])) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "What is AI?"},
    ]
    assert (request["gen_length"], request["temperature"], request["block_length"]) == (64, 0.5, 16)
    assert engine.priorities == [1]


async def test_items_are_a_conversation(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """Messages in both forms, and what an earlier response returned, are sent back as input."""
    engine.scripts = [[Event("an answer", "stop", Usage(3, 2, 2, 2), 7)]]
    first = await client.responses.create(model="dllm", input="one")
    assert (first.status, first.incomplete_details) == ("completed", None)
    items: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        *(item.model_dump() for item in first.output),
        {"type": "message", "role": "user", "content": "two"},
    ]
    await client.responses.create(model="dllm", input=items)
    assert json.loads(str(engine.requests[1]["messages"])) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": "two"},
    ]


async def test_a_stream_has_openais_events_in_order(client: AsyncOpenAI) -> None:
    """Opening, one delta per piece, done, and the whole response; numbered without a gap."""
    stream = await client.responses.create(model="dllm", input="hi", stream=True)
    events = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert deltas
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    numbers = [getattr(event, "sequence_number", None) for event in events]
    assert numbers == list(range(len(events)))
    assert "".join(deltas) == "<0><1><2><3>"
    last = events[-1]
    assert last.type == "response.incomplete"
    assert text_of(last.response) == "<0><1><2><3>"
    async with client.responses.stream(model="dllm", input="hi") as helper:
        assert [event.type async for event in helper][-1] == "response.incomplete"


async def test_log_probabilities_are_in_the_text(
    client: AsyncOpenAI, engine: ScriptedEngine
) -> None:
    """Asked for by `include`, each token has its own, in the part of text and in its deltas."""
    details: list[TokenDetail | None] = [
        TokenDetail(i, text, list(text.encode()), None, -0.5 - i, [])
        for i, text in enumerate(["a", "b"])
    ]
    steps = [
        Event("a", "", Usage(3, 1, 1, 1), 7, details=[details[0], None]),
        Event("ab", "stop", Usage(3, 2, 2, 2), 7, details=details),
    ]
    engine.scripts = [list(steps)]
    ask: Any = {"model": "dllm", "input": "hi", "include": ["message.output_text.logprobs"]}
    response = await client.responses.create(**ask)
    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage)
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [one.logprob for one in part.logprobs] == [-0.5, -1.5]
    assert engine.requests[0]["logprobs"] == 0
    seen = []
    async for event in await client.responses.create(**ask, stream=True):
        if event.type == "response.output_text.delta":
            seen += [one.logprob for one in event.logprobs]
            assert event.delta == "".join(one.token for one in event.logprobs)
    assert seen == [-0.5, -1.5]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["everything"]}, "include.0"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(
    url: str, engine: ScriptedEngine, fields: dict[str, Any], param: str
) -> None:
    """A 400 whose message or parameter names the field; nothing runs."""
    answer = await post(url, PATH, {"model": "dllm", "input": "hi"} | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert param in f"{error['param']} {error['message']}"
    assert engine.requests == []


async def test_tools_that_may_not_be_used_change_nothing(client: AsyncOpenAI) -> None:
    """With `tool_choice` none, tools are accepted."""
    tool: Any = {"type": "function", "name": "add", "parameters": {}, "strict": False}
    answer = await client.responses.create(
        model="dllm", input="hi", tools=[tool], tool_choice="none"
    )
    assert text_of(answer) == "<0><1><2><3>"


async def test_a_schema_reaches_the_engine(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """`text.format` is the form of the answer, and is returned."""
    schema: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form: Any = {"type": "json_schema", "name": "one", "schema": schema}
    answer = await client.responses.create(model="dllm", input="hi", text={"format": form})
    assert text_of(answer) == "<0><1><2><3>"
    assert json.loads(str(engine.requests[0]["structured_outputs"])) == {"json": schema}


async def test_a_prompt_that_is_too_long_is_the_input(
    client: AsyncOpenAI, engine: ScriptedEngine
) -> None:
    """The engine's refusal names this call's fields."""
    engine.longest = 0
    with pytest.raises(openai.BadRequestError, match="^Error code: 400.*input: ") as refused:
        await client.responses.create(model="dllm", input="hi")
    assert refused.value.code == "context_length_exceeded"


async def test_a_failure_in_a_stream_is_its_last_event(
    client: AsyncOpenAI, engine: ScriptedEngine
) -> None:
    """The response has failed, with the reason."""
    engine.scripts = [[*denoising(4)[:2], EngineFailure("out of luck")]]
    stream = await client.responses.create(model="dllm", input="hi", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "out of luck" in last.response.error.message


async def test_a_disconnect_cancels(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """Nobody waits for the answer, so it is not computed."""
    engine.scripts = [[*denoising(4)[:1], HANG]]
    stream = await client.responses.create(model="dllm", input="hi", stream=True)
    await stream.close()
    await until(lambda: engine.closed == 1)
