"""The one place where errors become HTTP answers."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from adapter.errors import AdapterError

logger = logging.getLogger("adapter")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of ours, and of validation, as `{"detail": ...}`."""
    app.add_exception_handler(AdapterError, _adapter_error)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _adapter_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdapterError)
    if error.status >= 500:
        logger.warning(
            "request_failed path=%s status=%d error=%s", request.url.path, error.status, error
        )
    return JSONResponse(
        {"detail": str(error)}, status_code=error.status, headers=dict(error.headers)
    )


async def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    """FastAPI's answer without the input.

    Echoing a prompt helps nobody, and what is wrong with an input (NaN, half a character) may be
    the very thing that cannot be written as JSON. A name that nobody knows may be so too.
    """
    assert isinstance(error, RequestValidationError)
    detail = [
        {
            "type": item["type"],
            "loc": [part if isinstance(part, int) else _printable(part) for part in item["loc"]],
            "msg": _printable(item["msg"]),
        }
        for item in error.errors()
    ]
    return JSONResponse({"detail": detail}, status_code=422)


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
