"""Errors in OpenAI's format, for OpenAI's paths."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError

from adapter.api.openai.responses import ErrorAnswer, ErrorInfo
from adapter.api.printable import MAX_NAME, printable
from adapter.errors import AdapterError, ContextExceeded, InvalidRequest, UnknownModel

Body = dict[str, Any]

#: Every path below /v1 except the adapter's own calls, also with extra slashes or behind a prefix.
PATHS = re.compile(r"/v1/++(?!(generate|generate_batch|result|health|livez)(/|$))")
OFFERED = (
    "/v1/chat/completions, /v1/completions, /v1/responses, /v1/decisions, /v1/score and /v1/models"
)

INVALID = "invalid_request_error"
#: Type and code for each status; every 5xx is `server_error`.
KINDS: Mapping[int, tuple[str, str | None]] = {
    400: (INVALID, None),
    401: (INVALID, "invalid_api_key"),
    404: (INVALID, None),
    405: (INVALID, None),
    408: ("timeout_error", "timeout"),
    413: (INVALID, "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}

#: OpenAI's names of fields that differ from the adapter's; for the length see `length_name`.
NAMES: Mapping[str, str] = {
    "gen_length": "max_tokens",
    "text_input": "prompt",
    "input_ids": "prompt",
}
#: What /v1/responses calls the length, and the chat that it makes.
RESPONSE_NAMES: Mapping[str, str] = {"gen_length": "max_output_tokens", "messages": "input"}
_NAMES = re.compile(rf"\b({'|'.join([*NAMES, 'messages'])})\b")
#: Parts of a validation error's path that name alternatives instead of fields.
_ALTERNATIVES = frozenset({"text", "texts", "tokens", "token lists", "items", "parts"})


def is_openai(path: str) -> bool:
    """Whether errors on this path have OpenAI's format."""
    return PATHS.search(path) is not None


def of_unknown_path(method: str, path: str) -> Body:
    """The error for a path that no route has."""
    return body(404, printable(f"{method} {path} is not offered here; {OFFERED} are"))


def length_name(request: Request) -> str:
    """The name that this call uses for the length."""
    name: str = getattr(request.state, "length_name", NAMES["gen_length"])
    return name


def status_and_body(error: AdapterError, length: str) -> tuple[int, Body]:
    """Status and body of an error; a refusal by the engine names the parameter before a colon."""
    message = str(error)
    if isinstance(error, InvalidRequest):
        message = _renamed(message, length)
        field, colon, _ = message.partition(":")
        param = field if colon and field.isidentifier() else None
        code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
        return 400, body(400, message, param=param, code=code)
    if isinstance(error, UnknownModel):
        return error.status, body(error.status, message, param="model", code="model_not_found")
    return error.status, body(error.status, message)


def of_validation(error: RequestValidationError, length: str) -> Body:
    """The first validation error, with the parameter's name."""
    problem = error.errors()[0]
    path = _path(problem, length)
    message = f"{path}: {printable(problem['msg'])}" if path else printable(problem["msg"])
    return body(400, message, param=path or None)


def body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Body:
    """The `ErrorAnswer` for this status, as JSON; `code` overrides the one of the status."""
    kind, usual = KINDS.get(status, ("server_error", None) if status >= 500 else (INVALID, None))
    info = ErrorInfo(message=message, type=kind, param=param, code=code or usual)
    return ErrorAnswer(error=info).model_dump()


def _path(problem: Mapping[str, Any], length: str) -> str:
    location: Sequence[str | int] = problem["loc"]
    inner = [p for p in location[2:] if p not in _ALTERNATIVES]
    fields = [printable(str(p), MAX_NAME) for p in (*location[1:2], *inner)]
    if problem["type"] == "json_invalid":
        return ""  # the path is an offset in the text
    path = ".".join(fields)
    return path if problem["type"] == "extra_forbidden" else _renamed(path, length)


def _renamed(text: str, length: str) -> str:
    is_response = length == RESPONSE_NAMES["gen_length"]
    names = {**NAMES, "gen_length": length, **(RESPONSE_NAMES if is_response else {})}
    return _NAMES.sub(lambda found: names.get(found[1], found[1]), text)
