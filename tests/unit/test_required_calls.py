"""A required call of a tool comes out of any model."""

import json
from pathlib import Path
from typing import Any

import pytest
from dllm_engine import LLM, SamplingParams

from adapter.api.openai.tool_calls import read_reply
from adapter.api.openai.tools import required_form
from tests.support.checkpoints import write_llada

FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"$ref": "#/$defs/unit"}, "exact": {"type": "boolean"}},
            "required": ["unit", "exact"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["m", "kg"]}},
        },
    },
    {"name": "stop"},
]


@pytest.mark.parametrize("functions", [FUNCTIONS, FUNCTIONS[:1], FUNCTIONS[1:]], ids=len)
def test_a_random_model_makes_a_valid_call(tmp_path: Path, functions: list[dict[str, Any]]) -> None:
    """Its text is one call of an offered function with valid arguments, at any temperature."""
    llm = LLM(write_llada(tmp_path), device="cpu")
    form = required_form(functions)
    params = [
        SamplingParams(gen_length=100, steps=20, temperature=t, seed=3, structured_outputs=form)
        for t in (0.0, 1.5)
    ]
    for answer in llm.generate(["hi", "hi"], params, chat=True, progress=False):
        names = frozenset(function["name"] for function in functions)
        reply = read_reply(answer.text, names, finished=True)
        assert reply.content == ""
        (call,) = reply.calls
        arguments = json.loads(call.arguments)
        if call.name == "stop":
            assert arguments == {}
        else:
            assert set(arguments) == {"unit", "exact"}
            assert arguments["unit"] in ("m", "kg")
            assert isinstance(arguments["exact"], bool)
