"""Tools in chats: what reaches the engine, and calls in answers, through OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from adapter_fakes import ScriptedEngine
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai_calls import QUESTION

from adapter.api.openai.tool_calls import FoundCall, read_reply
from adapter.types import Event, Usage

TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("add", "sub")
]
NAMES = frozenset({"add", "sub"})
CALL = '<tool_call>\n{"name": "add", "arguments": {"é": "</tool_call>"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "sub", "arguments": {}}</tool_call>'
ANSWER = f"I add. \n{CALL}\n{OTHER}\n"
#: Streams of this answer, character by character.
SCRIPT = [Event(ANSWER[:n], "", Usage(3, n, n, n), 7) for n in range(1, len(ANSWER))]
SCRIPT.append(Event(ANSWER, "stop", Usage(3, len(ANSWER), 1, 1), 7))


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine that writes a text and two calls."""
    return ScriptedEngine([list(SCRIPT)])


def ask(**more: Any) -> dict[str, Any]:
    """A chat with both tools."""
    return {"model": "dllm", "messages": QUESTION, "tools": TOOLS, **more}


async def test_calls_are_parsed_whole_and_streamed_alike(client: AsyncOpenAI) -> None:
    """Content, calls with ids, and `tool_calls`; in a stream no part of a tag is content."""
    answer = await client.chat.completions.create(**ask())
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I add."
    calls: Any = choice.message.tool_calls
    found = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
    assert found == [("add", {"é": "</tool_call>"}), ("sub", {})]
    assert len({call.id for call in calls}) == 2

    content, reasons = "", []
    streamed: dict[int, list[str]] = {}
    async for chunk in await client.chat.completions.create(**ask(stream=True)):
        (part,) = chunk.choices
        content += part.delta.content or ""
        reasons.append(part.finish_reason)
        for delta in part.delta.tool_calls or ():
            assert delta.function is not None
            if delta.index not in streamed:
                assert delta.id
                assert delta.type == "function"
                streamed[delta.index] = [delta.function.name or "", ""]
            streamed[delta.index][1] += delta.function.arguments or ""
    assert content == "I add."
    assert reasons[-1] == "tool_calls"
    expected = [[call.function.name, call.function.arguments] for call in calls]
    assert [streamed[i] for i in sorted(streamed)] == expected


async def test_the_engine_gets_tools_and_history(
    client: AsyncOpenAI, engine: ScriptedEngine
) -> None:
    """Tools, calls and results are inputs of the model; `none` leaves the tools out."""
    past: Any = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "3"},
    ]  # fmt: skip
    await client.chat.completions.create(**ask(messages=past))
    sent = engine.requests[-1]
    assert json.loads(str(sent["tools"])) == TOOLS
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    assert json.loads(str(sent["messages"]))[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
    ]
    assert "structured_outputs" not in sent
    answer = await client.chat.completions.create(**ask(tool_choice="none"))
    assert "tools" not in engine.requests[-1]
    assert answer.choices[0].message.content == ANSWER


async def test_a_required_call_has_its_form(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """Tag and name of a named function are fixed text; `required` allows each of several."""
    named = {"type": "function", "function": {"name": "sub"}}
    await client.chat.completions.create(**ask(tool_choice=named))
    assert json.loads(str(engine.requests[-1]["structured_outputs"])) == {
        "json": {"type": "object"},
        "prefix": '<tool_call>\n{"name": "sub", "arguments": ',
        "suffix": "}\n</tool_call>",
    }
    await client.chat.completions.create(**ask(tool_choice="required"))
    form = json.loads(str(engine.requests[-1]["structured_outputs"]))
    names = [each["properties"]["name"]["const"] for each in form["json"]["anyOf"]]
    assert names == ["add", "sub"]


async def test_a_form_is_kept_where_the_context_shortens_the_canvas(
    client: AsyncOpenAI, engine: ScriptedEngine
) -> None:
    """The room behind the prompt is asked for without the form, which one token cannot have."""
    engine.longest = 82
    await client.chat.completions.create(**ask(tool_choice="required"))
    assert engine.requests[-1]["gen_length"] == 82
    assert "structured_outputs" in engine.requests[-1]
    assert all("structured_outputs" not in c for c in engine.checked if c["gen_length"] == 1)
    assert engine.checked[-1]["gen_length"] == 1


async def test_without_parallel_calls_only_the_first_counts(client: AsyncOpenAI) -> None:
    """`parallel_tool_calls` false drops all calls but the first, whole and streamed."""
    answer = await client.chat.completions.create(**ask(parallel_tool_calls=False))
    assert len(answer.choices[0].message.tool_calls or ()) == 1
    stream = await client.chat.completions.create(**ask(parallel_tool_calls=False, stream=True))
    deltas = [d async for chunk in stream for d in chunk.choices[0].delta.tool_calls or ()]
    assert {delta.index for delta in deltas} == {0}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>add</tool_call>",
        '<tool_call>{"name": "mul", "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {}} and </tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1',
        "<tool_call>" + '{"a":' * 20_000,
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    """Broken JSON, unknown functions and arguments that are no object are content."""
    reply = read_reply(f"{text} ", NAMES, finished=True)
    assert (reply.content, reply.calls) == (f"{text} ", ())


def test_the_last_call_needs_no_closing_tag() -> None:
    """A model may end its answer in place of the tag."""
    reply = read_reply(OTHER.removesuffix("</tool_call>"), NAMES, finished=True)
    assert (reply.content, reply.calls) == ("", (FoundCall("sub", "{}"),))


PIECES = st.sampled_from(
    [CALL, OTHER, "<tool_call>", "</tool_call>", "<tool", "{}", " ", "\n", "a", '{"name": "add"}']
)


@given(pieces=st.lists(PIECES, max_size=6), cut=st.integers(0, 12))
def test_a_stream_never_takes_anything_back(pieces: list[str], cut: int) -> None:
    """Content and calls of each beginning are beginnings of those of the whole text."""
    text = "".join(pieces)[: -cut or None]
    whole = read_reply(text, NAMES, finished=True)
    for n in range(len(text) + 1):
        part = read_reply(text[:n], NAMES, finished=False)
        assert whole.content.startswith(part.content)
        assert whole.calls[: len(part.calls)] == part.calls
