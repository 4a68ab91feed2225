"""Which parameters of OpenAI's calls are honoured, accepted and refused; lengths."""

import dataclasses
import json
from typing import Any

import pytest
from adapter_fakes import (
    MODEL,
    ScriptedEngine,
    fast_settings,
    served_app,
)
from openai_calls import CHAT, QUESTION, TEXT, post, until_healthy
from pydantic import ValidationError

from adapter.api.openai.requests import ChatCall
from adapter.types import CheckResult

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add"}}
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"tools": [{"type": "function"}]}, "tools.0.function", "required"),
    (CHAT, {"tools": [{"type": "retrieval"}]}, "tools.0.type", "'function'"),
    (CHAT, {"tools": [TOOL | {"function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
    (CHAT, {"tools": [TOOL, TOOL]}, "tools", "add is there twice"),
    (CHAT, {"tools": [TOOL] * 129}, "tools", "at most 128"),
    (CHAT, {"tools": [TOOL | {"function": {"name": "a", "description": "a" * 2**18}}]}, "tools",
     "at most 262144 characters"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "needs tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice.literal['none','auto',"
     "'required']", "'required'"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}},
     "tool_choice", "not among the tools"),
    (CHAT, {"tools": [TOOL], "response_format": {"type": "json_object"}}, "", "response_format"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    (TEXT, {"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    (CHAT, {"presence_penalty": -1}, "presence_penalty", "not supported"),
    (CHAT, {"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    (CHAT, {"min_p": 0.1}, "min_p", "not supported"),
    (CHAT, {"repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
    (CHAT, {"min_tokens": 5}, "min_tokens", "not supported"),
    (CHAT, {"top_k": False}, "top_k", "valid integer"),
    (CHAT, {"verbosity": "low"}, "verbosity", "not supported"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs",
     "not supported"),
    (CHAT, {"unknown": 0}, "unknown", "not permitted"),
    (CHAT, {"functions": [{"name": "a"}]}, "functions", "function_call 'none' with it"),
    (CHAT, {"gen_length": 5}, "gen_length", "not permitted"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    (CHAT, {"temperature": 2.5}, "temperature", "less than or equal to 2"),
    (CHAT, {"top_p": 0}, "top_p", "greater than 0"),
    (CHAT, {"stop": ["x"] * 17}, "stop", "at most 16"),
    (CHAT, {"seed": 1.5}, "seed", "valid integer"),
    (CHAT, {"messages": []}, "messages", "at least 1 item"),
    (CHAT, {"messages": None}, "messages", "Field required"),
    (CHAT, {"messages": [{"role": "critic", "content": "a"}]}, "messages.0.role", "'user'"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "tool_call_id": "a"}]}, "messages.0",
     "of the tool only"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content", "required"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content",
     "a string or a list of text parts"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
     "messages.0.tool_calls.0.function", "required"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "unknown": 1}]}, "messages.0.unknown",
     "not permitted"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages.0.content.0.type", "'text'"),
    (TEXT, {"best_of": 2}, "best_of", "not supported"),
    (TEXT, {"echo": True}, "echo", "not supported"),
    (TEXT, {"prompt": ""}, "prompt", "at least 1 character"),
    (TEXT, {"prompt": []}, "prompt", "Should be a string"),
    (TEXT, {"prompt": 5}, "prompt", "Should be a string"),
    (TEXT, {"prompt": ["a", 5]}, "prompt.1", "valid string"),
    (TEXT, {"prompt": ["a"] * 65}, "prompt", "at most 64"),
    (TEXT, {"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
]  # fmt: skip


async def test_what_cannot_be_honoured_is_refused_by_name(url: str, engine: ScriptedEngine) -> None:
    """A parameter that is wrong, or that is not offered, is a 400 with its name and the reason."""
    for path, fields, param, reason in REFUSED:
        body = {"model": "dllm"} | ({"messages": QUESTION} if path == CHAT else {"prompt": "a"})
        answer = await post(url, path, body | fields)

        assert answer.status_code == 400, fields
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error", fields
        assert error["param"] == (param or None), fields
        assert reason in error["message"], fields
    assert engine.requests == []


#: Values that mean the same as leaving a parameter out, and parameters that change no answer.
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}),
    (CHAT, {"logprobs": False, "top_logprobs": None, "tools": [], "tool_choice": "none"}),
    (CHAT, {"tools": [{"type": "function"}], "tool_choice": "none"}),
    (CHAT, {"functions": [{"name": "a"}], "function_call": "none"}),
    (CHAT, {"response_format": {"type": "text"}, "stream": False, "modalities": ["text"]}),
    (CHAT, {"max_tokens": None, "temperature": None, "top_p": 1, "seed": None, "stop": None}),
    (CHAT, {"max_tokens": -1, "max_completion_tokens": -1}),
    (CHAT, {"user": "me", "safety_identifier": "a", "prompt_cache_key": "b"}),
    (CHAT, {"store": True, "metadata": {"run": "7"}, "service_tier": "flex"}),
    (CHAT, {"parallel_tool_calls": True, "prediction": {"type": "content", "content": "a"}}),
    (CHAT, {"stream_options": {"include_usage": True}}),
    (CHAT, {"stream": False, "stream_options": {"continuous_usage_stats": True}}),
    (CHAT, {"verbosity": "medium", "reasoning_effort": "medium"}),
    (CHAT, {"top_k": 0, "min_p": 0, "repetition_penalty": 1.0, "priority": 0}),
    (CHAT, {"top_k": -1, "min_tokens": 0, "length_penalty": 1, "use_beam_search": False}),
    (CHAT, {"stop": "", "chat_template_kwargs": {"enable_thinking": False}}),
    (CHAT, {"stop": [""], "skip_special_tokens": True, "stop_token_ids": []}),
    (CHAT, {"unknown": None, "timeout": None, "priority": None, "steps": None}),
    (TEXT, {"best_of": 1, "echo": False, "logprobs": None, "n": 1, "suffix": None}),
    (TEXT, {"suffix": "", "logprobs": False, "repetition_penalty": 1, "top_k": -1}),
    (TEXT, {"response_format": {"type": "text"}, "add_special_tokens": False}),
]


async def test_values_that_ask_for_nothing_are_accepted(url: str, engine: ScriptedEngine) -> None:
    """What changes no answer is no reason to refuse, and reaches no engine."""
    for path, fields in ACCEPTED:
        body = {"model": "dllm"} | ({"messages": QUESTION} if path == CHAT else {"prompt": "a"})
        answer = await post(url, path, body | fields)

        assert answer.status_code == 200, f"{fields} {answer.text}"
    plain = {"temperature", "gen_length", "top_p"}
    assert all(inputs.keys() - {"messages", "text_input"} <= plain for inputs in engine.requests)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": []}, ""),
        ({"role": "assistant", "content": None, "refusal": "I will not"}, "I will not"),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "a"),
        ({"role": "assistant", "content": "a", "annotations": [{"type": "url"}]}, "a"),
        ({"role": "user", "content": "a", "type": "text"}, "a"),
        ({"role": "user", "content": "a", "name": "ann", "unknown": None}, "a"),
        ({"role": "user", "content": ""}, ""),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
            "a",
        ),
    ],
)
async def test_messages_of_a_history(
    url: str, engine: ScriptedEngine, message: dict[str, Any], text: str
) -> None:
    """Messages are taken as clients keep them, empty ones and extra fields included."""
    answer = await post(url, CHAT, {"model": "dllm", "messages": [message, *QUESTION]})

    assert answer.status_code == 200, answer.text
    sent = json.loads(str(engine.requests[0]["messages"]))
    assert sent == [{"role": message["role"], "content": text}, *QUESTION]


LENGTHS: list[tuple[str, dict[str, Any], int]] = [
    (CHAT, {}, 128),
    (CHAT, {"max_tokens": 4096}, 512),
    (CHAT, {"max_completion_tokens": 2**31 - 1}, 512),
    (CHAT, {"max_tokens": 20, "max_completion_tokens": 30}, 20),
    (TEXT, {}, 16),
    (TEXT, {"max_tokens": 1000}, 512),
]


@pytest.mark.parametrize(("path", "fields", "length"), LENGTHS)
async def test_max_tokens_is_an_upper_bound(
    url: str, engine: ScriptedEngine, path: str, fields: dict[str, Any], length: int
) -> None:
    """A length beyond DLLM_MAX_GEN_LENGTH is shortened to it; of two lengths the smaller counts."""
    body = {"model": "dllm"} | ({"messages": QUESTION} if path == CHAT else {"prompt": "a"})
    answer = await post(url, path, body | fields)

    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert [request["gen_length"] for request in engine.requests] == [length]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_length_is_what_the_context_has_left(
    url: str, engine: ScriptedEngine, path: str, stream: bool
) -> None:
    """A canvas that does not fit behind the prompt is shortened, and its block with it."""
    engine.longest = 82
    body = {"model": "dllm", "max_tokens": 128, "block_length": 100, "stream": stream}
    body |= {"messages": QUESTION} if path == CHAT else {"prompt": ["a", "b"]}
    answer = await post(url, path, body)

    assert answer.status_code == 200, answer.text
    wanted = [(82, 82)] * (1 if path == CHAT else 2)
    assert [(r["gen_length"], r["block_length"]) for r in engine.requests] == wanted


async def test_a_block_wise_model_keeps_its_block(url: str, engine: ScriptedEngine) -> None:
    """A shortened answer is decoded in blocks of the length asked for."""
    engine.longest = 82
    engine.model = dataclasses.replace(MODEL, block_length=32)
    body = {"model": "dllm", "max_tokens": 128, "block_length": 100, "messages": QUESTION}
    answer = await post(url, CHAT, body)

    assert answer.status_code == 200, answer.text
    (request,) = engine.requests
    assert (request["gen_length"], request["block_length"]) == (82, 100)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (TEXT, "prompt")])
async def test_prompt_without_room_is_named(
    url: str, engine: ScriptedEngine, path: str, param: str, stream: bool
) -> None:
    """A prompt that fills the context is the one at fault, and not a length that was not sent."""
    engine.longest = 0
    body: dict[str, Any] = {"model": "dllm", "stream": stream}
    body |= {"messages": QUESTION} if path == CHAT else {"prompt": "a"}
    answer = await post(url, path, body)

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert error["message"] == (
        f"{param}: its 512 tokens leave no room for an answer in the model's 512"
    )
    assert engine.requests == []


async def test_chats_are_limited_by_the_context_alone(url: str, engine: ScriptedEngine) -> None:
    """The limit in characters is not of OpenAI's calls."""
    long = "x" * 100_000
    for path, prompt in ((CHAT, {"messages": [{"role": "user", "content": long}]}),
                         (TEXT, {"prompt": long}), (TEXT, {"prompt": [1] * 10_000})):  # fmt: skip
        answer = await post(url, path, {"model": "dllm"} | prompt)
        assert answer.status_code == 200, answer.text
    assert len(engine.requests) == 3


async def test_what_the_engine_refuses_is_not_run(url: str, engine: ScriptedEngine) -> None:
    """A request that no length would make valid is refused before it runs."""
    engine.check_results["What is AI?"] = CheckResult(refusal="remasking: must be one of a, b")
    answer = await post(url, CHAT, {"model": "dllm", "messages": QUESTION, "remasking": "x"})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "remasking")
    assert engine.requests == []


async def test_engine_that_cannot_be_asked_is_not_waited_for(
    url: str, engine: ScriptedEngine
) -> None:
    """While an engine does not say what fits, a call runs as it is."""
    engine.check_hangs = True
    answer = await post(url, CHAT, {"model": "dllm", "messages": QUESTION})

    assert answer.status_code == 200
    assert engine.requests[0]["gen_length"] == 128


@pytest.mark.parametrize(
    ("setting", "left", "length"), [(0, None, 512), (0, 300, 300), (64, 300, 64)]
)
async def test_chat_without_a_length_gets_what_is_left_up_to_the_setting(
    database_url: str, engine: ScriptedEngine, setting: int, left: int | None, length: int
) -> None:
    """DLLM_CHAT_MAX_TOKENS bounds a chat that gives no length; 0 leaves it to the other limits."""
    engine.longest = left
    settings = fast_settings(database_url, chat_max_tokens=setting)
    async with served_app(settings, engine) as address:
        await until_healthy(address)
        answer = await post(address, CHAT, {"model": "dllm", "messages": QUESTION})
    assert answer.status_code == 200, answer.text
    assert engine.requests[0]["gen_length"] == length


REFUSALS = [
    "messages: has more than the 512 tokens that may be",
    "gen_length: prompt (500 tokens) plus gen_length (128) in whole blocks of 32 must be at most "
    "512; got 640",
]


@pytest.mark.parametrize("reason", REFUSALS)
async def test_every_refusal_of_the_length_has_the_code(
    url: str, engine: ScriptedEngine, reason: str
) -> None:
    """However the engine says that a request is longer than the context, it has OpenAI's code."""
    engine.check_results = {"hi": CheckResult(refusal=reason)}
    messages = [{"role": "user", "content": "hi"}]
    answer = await post(url, CHAT, {"model": "dllm", "messages": messages})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_a_response_format_is_a_structured_output() -> None:
    """A schema or JSON mode reaches the model as `structured_outputs`; both at once are refused."""
    schema = {"type": "object", "properties": {"b": {"type": "null"}, "a": True}}
    body: dict[str, Any] = {"model": "dllm", "messages": [{"role": "user", "content": "x"}]}
    formats: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
            {"json": schema},
        ),
        ({"type": "json_object"}, {"json_object": True}),
    ]
    for given, wanted in formats:
        call = ChatCall.model_validate({**body, "response_format": given})
        inputs = call.request(default=64, longest=64).inputs()
        assert inputs["structured_outputs"] == json.dumps(wanted)
        with pytest.raises(ValidationError, match="beside structured_outputs"):
            ChatCall.model_validate(
                {**body, "response_format": given, "structured_outputs": {"regex": "a"}}
            )
