"""Our errors in OpenAI's shape, for the calls that are OpenAI's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError

from adapter.api.openai.responses import ErrorAnswer, ErrorInfo
from adapter.errors import AdapterError, InvalidRequest

Body = dict[str, Any]

PATHS = re.compile(r"/v1/(completions|chat/completions|models)(/|$)")

INVALID = "invalid_request_error"
#: Type and code of what a status stands for; 5xx are all `server_error`.
KINDS: Mapping[int, tuple[str, str | None]] = {
    400: (INVALID, None),
    401: (INVALID, "invalid_api_key"),
    404: (INVALID, "model_not_found"),
    405: (INVALID, None),
    408: ("timeout_error", "timeout"),
    413: (INVALID, "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}

#: What our own requests call a parameter, and what it is called in these calls; the length has two
#: names in some, see `length_name`.
NAMES: Mapping[str, str] = {
    "gen_length": "max_tokens",
    "text_input": "prompt",
    "input_ids": "prompt",
}
_NAMES = re.compile(rf"\b({'|'.join(NAMES)})\b")
#: Parts of a validation error's path that tell of alternatives, not of fields.
_ALTERNATIVES = frozenset({"text", "texts", "tokens", "token lists"})


class ModelNotFound(AdapterError):
    """There is no model of that name here."""

    status = 404


def is_openai(path: str) -> bool:
    """Whether whoever calls this path expects errors of this shape."""
    return PATHS.search(path) is not None


def length_name(request: Request) -> str:
    """What this call has named the length, or would have."""
    name: str = getattr(request.state, "length_name", NAMES["gen_length"])
    return name


def status_and_body(error: AdapterError, length: str) -> tuple[int, Body]:
    """An error of ours; what the engine refuses names the parameter before a colon."""
    message = str(error)
    if isinstance(error, InvalidRequest):
        message = _renamed(message, length)
        field, colon, _ = message.partition(":")
        return 400, body(400, message, param=field if colon and field.isidentifier() else None)
    param = "model" if isinstance(error, ModelNotFound) else None
    return error.status, body(error.status, message, param=param)


def of_validation(error: RequestValidationError, length: str) -> Body:
    """The first thing that is wrong with a body, by the parameter's name."""
    problem = error.errors()[0]
    path = _path(problem, length)
    message = f"{path}: {problem['msg']}" if path else str(problem["msg"])
    return body(400, _printable(message), param=_printable(path) or None)


def body(status: int, message: str, *, param: str | None = None) -> Body:
    """The body for this status, `ErrorAnswer` as JSON."""
    kind, code = KINDS.get(status, ("server_error", None) if status >= 500 else (INVALID, None))
    info = ErrorInfo(message=message, type=kind, param=param, code=code)
    return ErrorAnswer(error=info).model_dump()


def _path(problem: Mapping[str, Any], length: str) -> str:
    location: Sequence[str | int] = problem["loc"]
    fields = [str(part) for part in location[1:] if part not in _ALTERNATIVES]
    if problem["type"] == "json_invalid":
        return ""  # the rest is where in the text it is
    path = ".".join(fields)
    return path if problem["type"] == "extra_forbidden" else _renamed(path, length)


def _renamed(text: str, length: str) -> str:
    names = {**NAMES, "gen_length": length}
    return _NAMES.sub(lambda found: names[found[1]], text)


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
