"""Chat messages and tools as JSON: what a request may send, and how both become a chat.

A chat template that knows `tools` renders them itself. For any other template, `in_plain_words`
writes tools, calls and results into ordinary messages, in the format that Qwen's models use.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from dllm_engine.errors import InvalidRequest

Message = dict[str, Any]

#: Most tools of a request, as in OpenAI's API.
MAX_TOOLS = 128
#: Characters that a name of a function may have, as in OpenAI's API.
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
#: How deep a tool's description and a call's arguments may nest.
_MAX_NESTING = 64

_FUNCTION_KEYS = {"name", "description", "parameters", "arguments", "strict"}
_KEYS = {"role", "content"}
#: Keys that a message may have besides, by its role.
_MORE_KEYS = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}
_SHAPE = 'must be a JSON list of {"role": string, "content": string}'

_INTRODUCTION = (
    "You can call functions. Each line between the tags <tools></tools> describes one, as JSON:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call a function, write its name and its arguments as JSON between the tags"
    " <tool_call></tool_call>, once for each call:\n"
    "<tool_call>\n"
    '{{"name": "name of the function", "arguments": {{"name of an argument": "its value"}}}}\n'
    "</tool_call>"
)


def parse_messages(messages_json: str) -> list[Message]:
    """Read a JSON list of messages; arguments of calls become objects.

    An `assistant` may have `tool_calls`, and a `tool` a `tool_call_id`, as in OpenAI's API.

    Raises:
        InvalidRequest: it is not such a list.
    """
    messages = _parse("messages", messages_json, _SHAPE)
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", f"{_SHAPE}, not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not _has_its_keys(message):
            raise InvalidRequest("messages", f"{_SHAPE}; item {i} is not")
        if "tool_calls" in message:
            message["tool_calls"] = _calls(message["tool_calls"], i)
    return messages


def parse_tools(tools_json: str) -> list[dict[str, Any]]:
    """Read a JSON list of tools, as OpenAI's API has them.

    Raises:
        InvalidRequest: it is not such a list, or too long.
    """
    shape = 'must be a JSON list of {"type": "function", "function": {"name": string, …}}'
    tools = _parse("tools", tools_json, shape)
    if not isinstance(tools, list) or not tools:
        raise InvalidRequest("tools", f"{shape}, not empty")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest("tools", f"must be at most {MAX_TOOLS}; got {len(tools)}")
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise InvalidRequest("tools", f"{shape}; item {i} is not")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problem = f"item {i}: name must match {_NAME.pattern}"
            raise InvalidRequest("tools", problem)
        if name in names:
            raise InvalidRequest("tools", f"item {i}: {name} is there twice")
        names.add(name)
    _check_nesting("tools", tools)
    return tools


def protect_chat(
    messages: Sequence[Message], tools: Sequence[Any], change: Callable[[str], str]
) -> tuple[list[Message], list[Any]]:
    """The same chat with every text of the caller changed.

    Keys that the API defines are left as they are; names of arguments are texts of the caller.
    """
    changed = [
        {
            key: [_changed_tool(call, change) for call in value]
            if key == "tool_calls"
            else change(value)
            for key, value in message.items()
        }
        for message in messages
    ]
    return changed, [_changed_tool(tool, change) for tool in tools]


def _changed_tool(tool: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A tool or a call, of which templates read `type`, `function` and what is in it."""
    function = {
        key if key in _FUNCTION_KEYS else change(key): _map_texts(value, change)
        for key, value in tool["function"].items()
    }
    others = {
        change(key): _map_texts(value, change)
        for key, value in tool.items()
        if key not in ("type", "function")
    }
    return {"type": "function", "function": function} | others


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same JSON value with every string changed, keys of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    return value


def in_plain_words(messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
    """Messages of role and content alone, for a template that knows no tools.

    The tools go to the end of the system message, calls to the end of the assistant's message,
    and results that follow each other become one message of the user.
    """
    found: list[Message] = []
    for is_result, group in itertools.groupby(messages, lambda m: m["role"] == "tool"):
        if is_result:
            results = (f"<tool_response>\n{m['content']}\n</tool_response>" for m in group)
            found.append({"role": "user", "content": "\n".join(results)})
        else:
            found += [_with_calls(message) for message in group]
    if tools:
        lines = "\n".join(map(_json, tools))
        text = _INTRODUCTION.format(tools=lines)
        if found[0]["role"] == "system":
            found[0] = {"role": "system", "content": _joined(found[0]["content"], text, "\n\n")}
        else:
            found.insert(0, {"role": "system", "content": text})
    return found


def _with_calls(message: Message) -> Message:
    calls = [
        f"<tool_call>\n{_json(call['function'])}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return {
        "role": message["role"],
        "content": _joined(message["content"], "\n".join(calls), "\n"),
    }


def _joined(before: str, behind: str, between: str) -> str:
    return between.join(text for text in (before, behind) if text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parse(field: str, text: str, shape: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"{shape}: {error}") from error


def _has_its_keys(message: Message) -> bool:
    texts = [value for key, value in message.items() if key != "tool_calls"]
    if not set(message) >= _KEYS or not all(isinstance(text, str) for text in texts):
        return False
    return set(message) <= _KEYS | _MORE_KEYS.get(message["role"], set())


def _calls(calls: Any, index: int) -> list[dict[str, Any]]:
    """Calls in a history, with their arguments as objects."""
    shape = '[{"function": {"name": string, "arguments": object, or one as JSON}}]'
    if not isinstance(calls, list):
        raise InvalidRequest("messages", f"item {index}: tool_calls must be {shape}")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest("messages", f"item {index}: tool_calls must be {shape}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            what = f"item {index}: arguments of {function['name'][:64]} must be a JSON object"
            arguments = _parse("messages", arguments or "{}", what)
        if not isinstance(arguments, dict):
            raise InvalidRequest("messages", f"item {index}: tool_calls must be {shape}")
        _check_nesting("messages", arguments)
        made: dict[str, Any] = {"name": function["name"], "arguments": arguments}
        found.append({"type": "function", "function": made})
        if isinstance(call.get("id"), str):
            found[-1]["id"] = call["id"]
    return found


def _check_nesting(field: str, value: Any) -> None:
    level = [value]
    for _ in range(_MAX_NESTING):
        level = [
            inner
            for item in level
            if isinstance(item, list | dict)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    if level:
        raise InvalidRequest(field, f"must nest at most {_MAX_NESTING} levels deep")
