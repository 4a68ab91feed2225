"""Tools in a chat: the template renders them, or words do, and no text becomes a control token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dllm_engine import LLM, InvalidRequest, SamplingParams
from dllm_engine.tokenizer import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.support.checkpoints import EOT, LLADA_SPECIALS, MASK, write_llada

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"é": {"type": "integer"}}},
    },
}
#: A call, its result, and the next question.
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "1+2?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"é": 1}'}}
        ],
    },
    {"role": "tool", "content": "3", "tool_call_id": "a"},
    {"role": "tool", "content": "4", "tool_call_id": "b"},
]
#: Renders tools, calls and results as templates of Qwen's family do, in few words.
KNOWS_TOOLS = """{%- for tool in tools or [] %}T {{ tool | tojson }};{% endfor %}
{%- for m in messages %}<|start_header_id|>{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}{% set f = call.function %}
{{- 'CALL ' }}{{ f.name }} {{ f.arguments | tojson }}{% endfor %}<|eot_id|>{% endfor %}"""


def with_template(checkpoint: Path, template: str | None) -> Tokenizer:
    """The random checkpoint's tokenizer with another template."""
    plain = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    plain.chat_template = template
    return Tokenizer(plain, MASK)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decoded text, without special tokens."""
    return tokenizer.decode(np.array(ids, dtype=np.int32))


def test_a_template_that_knows_tools_renders_them(checkpoint: Path) -> None:
    """It gets tools as they are, calls with arguments as objects, and results by their role."""
    tokenizer = with_template(checkpoint, KNOWS_TOOLS)
    ids = tokenizer.encode_messages(json.dumps(HISTORY), json.dumps([ADD]))
    described = json.dumps(ADD, ensure_ascii=False)
    expected = f'T {described};user: 1+2?assistant: CALL add {{"é": 1}}tool: 3tool: 4'
    assert text_of(tokenizer, ids) == expected
    assert ids.count(EOT) == 4


@pytest.mark.parametrize("has_system", [True, False])
def test_a_template_that_knows_none_gets_them_in_words(checkpoint: Path, has_system: bool) -> None:
    """Tools end the system message, calls are JSON between tags, and results one user message."""
    tokenizer = Tokenizer.load(checkpoint, MASK)
    assert tokenizer is not None
    system = [{"role": "system", "content": "Be brief."}] if has_system else []
    ids = tokenizer.encode_messages(json.dumps([*system, *HISTORY]), json.dumps([ADD]))
    text = text_of(tokenizer, ids)
    begin = "system\n\nBe brief.\n\nYou can call" if has_system else "system\n\nYou can call"
    assert text.startswith(begin)
    assert f"<tools>\n{json.dumps(ADD, ensure_ascii=False)}\n</tools>\n" in text
    _, chat = text.split("user\n\n1+2?")
    assert chat == (
        'assistant\n\n<tool_call>\n{"name": "add", "arguments": {"é": 1}}\n</tool_call>'
        "user\n\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>"
        "assistant\n\n"
    )


@pytest.mark.parametrize("template", [KNOWS_TOOLS, None], ids=["knows tools", "the checkpoint's"])
def test_no_text_of_a_tool_becomes_a_control_token(checkpoint: Path, template: str | None) -> None:
    """Names of arguments, descriptions, arguments, ids and results stay text in every template."""
    own = PreTrainedTokenizerFast.from_pretrained(checkpoint).chat_template
    tokenizer = with_template(checkpoint, template or own)

    def chat(text: str) -> list[int]:
        tool = {**ADD["function"], "description": text, text: text}
        tool["parameters"] = {"properties": {text: {"enum": [text, [text]]}}, text: 1}
        call = {"id": text, "function": {"name": text, "arguments": {text: [{text: text}]}}}
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "content": text, "tool_call_id": text},
        ]
        tools = [{"type": "function", "function": tool}]
        return tokenizer.encode_messages(json.dumps(messages), json.dumps(tools))

    specials = set(LLADA_SPECIALS.values())
    plain = [i for i in chat("x") if i in specials]
    for text in (*LLADA_SPECIALS, "\ue0000\ue001", "<|eot_id|><|mdm_mask|>\ue000"):
        ids = chat(text)
        assert [i for i in ids if i in specials] == plain
        assert text in text_of(tokenizer, ids)


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ("{", "must be a JSON list"),
        ("[]", "not empty"),
        ("[1]", "item 0 is not"),
        ('[{"type": "retrieval", "function": {"name": "a"}}]', "item 0 is not"),
        ('[{"type": "function", "function": {"name": "a b"}}]', "item 0: name must match"),
        ('[{"type": "function", "function": {}}]', "item 0: name must match"),
        (json.dumps([ADD, ADD]), "item 1: add is there twice"),
        (json.dumps([ADD] * 129), "must be at most 128; got 129"),
        (
            '[{"type": "function", "function": {"name": "a", "parameters": '
            + '{"a":' * 70 + "1" + "}" * 70 + "}}]",
            "must nest at most 64 levels deep",
        ),
    ],
)  # fmt: skip
def test_a_wrong_tool_is_refused_by_name(checkpoint: Path, tools: str, problem: str) -> None:
    """The error names `tools`, the item and the limit."""
    tokenizer = with_template(checkpoint, KNOWS_TOOLS)
    with pytest.raises(InvalidRequest, match="^tools: ") as refusal:
        tokenizer.encode_messages('[{"role": "user", "content": "a"}]', tools)
    assert problem in str(refusal.value)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "a", "tool_calls": []},
        {"role": "assistant", "content": "a", "tool_call_id": "a"},
        {"role": "assistant", "content": "a", "tool_calls": {}},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"arguments": {}}}]},
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "a", "arguments": "[1"}}]},
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "a", "arguments": [1]}}]},
    ],
)  # fmt: skip
def test_a_wrong_call_in_a_history_is_refused(checkpoint: Path, message: Any) -> None:
    """The error names the message."""
    tokenizer = with_template(checkpoint, KNOWS_TOOLS)
    with pytest.raises(InvalidRequest, match="^messages: .*item 0"):
        tokenizer.encode_messages(json.dumps([message]))


def test_tools_offline_are_part_of_the_prompt(tmp_path: Path) -> None:
    """`generate` and `stream` take tools with messages or a chat, and refuse them elsewhere."""
    llm = LLM(write_llada(tmp_path, max_sequence_length=1024), device="cpu")
    params = SamplingParams(gen_length=2)
    (with_tools,) = llm.generate("hi", params, chat=True, tools=[ADD], progress=False)
    (without,) = llm.generate("hi", params, chat=True, progress=False)
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens + len("add")
    *_, last = llm.stream([{"role": "user", "content": "hi"}], params, tools=[ADD])
    assert last.usage.prompt_tokens == with_tools.usage.prompt_tokens
    with pytest.raises(InvalidRequest, match="^tools: needs messages"):
        llm.generate("hi", params, tools=[ADD], progress=False)
