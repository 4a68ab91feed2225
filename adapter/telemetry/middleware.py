"""Request id, log line, metrics and span of every call."""

import re
import time
import uuid

import structlog
from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import HTTP_REQUESTS, HTTP_SECONDS
from adapter.telemetry.tracing import TRACEPARENT, call_span, set_failed

log = get_logger()

HEADER = "X-Request-ID"
#: Ids accepted from clients; they go into the log, the database and Triton's messages.
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
#: Polled every few seconds by machines; logged at debug.
ROUTINE = frozenset({"/v1/health", "/v1/livez", "/metrics"})


class TelemetryMiddleware:
    """Gives every call an id, and records it in log, metrics and traces."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on and record its outcome."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get(HEADER, "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        span = call_span(f"{request.method} {scope['path']}", request.headers)
        request.state.request_id = request_id
        request.state.traceparent = TRACEPARENT.get()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        began = time.perf_counter()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except BaseException as error:
            set_failed(span, error)
            raise
        finally:
            seconds = time.perf_counter() - began
            # The route's template: ids in paths would make a series for each job.
            route = getattr(scope.get("route"), "path", "none")
            # 499, as in nginx: the client disconnected before the response began.
            HTTP_REQUESTS.labels(request.method, route, str(status or 499)).inc()
            HTTP_SECONDS.labels(request.method, route).observe(seconds)
            span.set_attributes(
                {
                    "http.route": route,
                    "http.response.status_code": status,
                    "request_id": request_id,
                }
            )
            span.end()
            write = log.debug if route in ROUTINE else log.info
            write(
                "call",
                method=request.method,
                path=scope["path"],
                status=status,
                milliseconds=round(1000 * seconds, 1),
                client=request.client.host if request.client else None,
                key=getattr(request.state, "api_key", None),
            )
            structlog.contextvars.unbind_contextvars("request_id")
