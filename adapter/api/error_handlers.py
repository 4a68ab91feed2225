"""Turns errors into HTTP responses."""

import re
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from adapter.api.deps import uncount
from adapter.api.openai import errors as openai
from adapter.api.printable import MAX_NAME, printable
from adapter.errors import AdapterError, InvalidRequest
from adapter.telemetry.logs import get_logger

log = get_logger()

#: Names of the engine's inputs that differ from the request's fields.
NAMES = {"text_input": "prompt"}
#: A response lists no more problems than this.
MAX_PROBLEMS = 20
#: Refusals that do not count for the rate limit, as no engine was asked. Others do: they cost work.
UNCOUNTED = (413, 429)
SLASHES = re.compile("/+")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error as `{"detail": ...}`, or in OpenAI's format on OpenAI's paths."""
    app.add_exception_handler(AdapterError, _adapter_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _own_error)


async def _adapter_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdapterError)
    if error.status in UNCOUNTED:
        await uncount(request)
    if error.status >= 500:
        log.warning("call_failed", path=request.url.path, status=error.status, error=str(error))
    status, body = error.status, {"detail": _detail(error)}
    if openai.is_openai(request.url.path):
        status, body = openai.status_and_body(error, openai.length_name(request))
    return JSONResponse(body, status_code=status, headers=dict(error.headers))


def _detail(error: AdapterError) -> str | list[dict[str, Any]]:
    """An engine's refusal by field, like the adapter's own; other errors as text."""
    if not isinstance(error, InvalidRequest):
        return str(error)
    name, colon, reason = str(error).partition(": ")
    path: list[str | int] = [NAMES.get(name, name)]
    if error.prompt is not None:
        path, reason = ["prompts", error.prompt], str(error)
    elif not (colon and name.isidentifier()):
        path, reason = [], str(error)
    return [{"type": "engine_refusal", "loc": ["body", *path], "msg": reason}]


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer a refusal of the framework: an unknown path or method, or a body that is no JSON."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and isinstance(error.__cause__, ValueError | RecursionError):
        error = HTTPException(400, _why_no_json(error.__cause__))
    if error.status_code == 404 and (location := _without_extra_slashes(request)):
        return RedirectResponse(location)
    if not openai.is_openai(request.url.path):
        return await http_exception_handler(request, error)
    body = openai.body(error.status_code, str(error.detail))
    if error.status_code == 404:
        body = openai.of_unknown_path(request.method, request.url.path)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _without_extra_slashes(request: Request) -> str | None:
    """The path without extra slashes, if it has some and a route has the path without them.

    It is a relative address, so that the call stays on this server.
    """
    path = SLASHES.sub("/", request.scope["path"]).rstrip("/")
    if path == request.scope["path"]:
        return None
    scope = {**request.scope, "path": path}
    if all(route.matches(scope)[0] is Match.NONE for route in request.app.router.routes):
        return None
    return quote(path) + (f"?{request.url.query}" if request.url.query else "")


def _why_no_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the body is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "the body must be encoded as UTF-8"
    return "the body has a number with too many digits"


async def _own_error(request: Request, _error: Exception) -> JSONResponse:
    """A bug in the adapter; the server logs it, and the client gets no details."""
    message = "internal error of the adapter"
    is_openai = openai.is_openai(request.url.path)
    body = openai.body(500, message) if is_openai else {"detail": message}
    return JSONResponse(body, status_code=500)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's response without the input, and with the first problems if there are many.

    An invalid value or field name (NaN, a lone surrogate) may not be valid JSON, and prompts are
    not repeated.
    """
    assert isinstance(error, RequestValidationError)
    await uncount(request)
    if openai.is_openai(request.url.path):
        body = openai.of_validation(error, openai.length_name(request))
        return JSONResponse(body, status_code=400)
    problems = error.errors()
    detail = [
        {
            "type": item["type"],
            "loc": [p if isinstance(p, int) else printable(p, MAX_NAME) for p in item["loc"]],
            "msg": printable(item["msg"]),
            **_limit_of(item),
        }
        for item in problems[:MAX_PROBLEMS]
    ]
    if (more := len(problems) - MAX_PROBLEMS) > 0:
        detail.append({"type": "more", "loc": ["body"], "msg": f"and {more} more problems"})
    return JSONResponse({"detail": detail}, status_code=422)


def _limit_of(problem: dict[str, Any]) -> dict[str, Any]:
    """The greatest length, for clients that split what they send."""
    most = problem.get("ctx", {}).get("max_length")
    return {} if most is None else {"ctx": {"max_length": most}}
