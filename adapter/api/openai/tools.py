"""Tools of OpenAI's chats: what a call may ask for, and the form that a required call has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapter.api.openai.fields import OpenAIBody
from adapter.api.schemas import ToolName

#: What a call is written between.
OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ChosenName(OpenAIBody):
    """The name of a function."""

    name: ToolName


class NamedChoice(OpenAIBody):
    """The function that the model has to call."""

    type: Literal["function"]
    function: ChosenName


@dataclass(frozen=True, slots=True)
class Offer:
    """The functions that an answer may call, and whether several calls count."""

    names: frozenset[str]
    parallel: bool


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def required_form(functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The `structured_outputs` of a text that is one call of one of these functions.

    Tags and, of a single function, the name are fixed text; arguments are valid under the
    function's `parameters`.
    """
    if len(functions) == 1:
        before = f'{OPEN}\n{{"name": "{functions[0]["name"]}", "arguments": '
        schema: Any = _parameters(functions[0])
        return {"json": schema, "prefix": before, "suffix": f"}}\n{CLOSE}"}
    calls = [_call_schema(i, function) for i, function in enumerate(functions)]
    return {"json": {"anyOf": calls}, "prefix": f"{OPEN}\n", "suffix": f"\n{CLOSE}"}


def _call_schema(index: int, function: dict[str, Any]) -> dict[str, Any]:
    root = f"#/anyOf/{index}/properties/arguments"
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": _moved(_parameters(function), root),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _parameters(function: dict[str, Any]) -> Any:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    return function.get("parameters") or nothing


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references begin at its new place in another one."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved
