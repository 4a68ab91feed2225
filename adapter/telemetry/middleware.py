"""Request id, log line, metrics and span of every call."""

import asyncio
import re
import time
import uuid
from collections.abc import Sequence

import structlog
from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter.errors import AdapterError, WorkerStops
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import count_call
from adapter.telemetry.tracing import TRACEPARENT, call_span, set_failed

log = get_logger()

HEADER = "X-Request-ID"
#: Ids accepted from clients; they go into the log, the database and Triton's messages.
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
#: What uvicorn cancels a call with when the time for a graceful stop is over.
GRACE_OVER = "timeout graceful shutdown exceeded"
STOPPED = "this worker stops; send the call again"
#: Polled every few seconds by machines; logged at debug.
ROUTINE = frozenset({"/health", "/v1/health", "/v1/livez", "/metrics"})


class TelemetryMiddleware:
    """Gives every call an id, and records it in log, metrics and traces.

    `routes` name the route of a call that a middleware answers before it is routed.
    """

    def __init__(self, app: ASGIApp, *, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

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
        kind = "response"

        async def watched(message: Message) -> None:
            nonlocal status, kind
            if message["type"] == "http.response.start":
                status = message["status"]
                kind = _kind(request, Headers(raw=message["headers"]))
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError as error:
            set_failed(span, error)
            if GRACE_OVER not in str(error):
                raise
            # Ends here, since the server would log a traceback for each such call.
            if not status:
                answer = request.app.exception_handlers[AdapterError]
                response = await answer(request, WorkerStops(STOPPED))
                await response(scope, receive, watched)
        except Exception as error:
            set_failed(span, error)
            if not status:
                # Answered here, and not by the server, so that the response has the request id.
                response = await request.app.exception_handlers[Exception](request, error)
                await response(scope, receive, watched)
            raise
        except BaseException as error:
            set_failed(span, error)
            raise
        finally:
            seconds = time.perf_counter() - began
            route = self._route(scope)
            # 499, as in nginx: the client disconnected before the response began.
            count_call(request.method, route, status or 499, kind, seconds)
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

    def _route(self, scope: Scope) -> str:
        """The route's template, since ids in paths would make a series for each job."""
        if (route := scope.get("route")) is None:
            found = (r for r in self._routes if r.matches(scope)[0] is not Match.NONE)
            route = next(found, None)
        return getattr(route, "path", "none")


def _kind(request: Request, headers: Headers) -> str:
    if headers.get("content-type", "").startswith("text/event-stream"):
        return "stream"
    return "poll" if request.query_params.get("wait") else "response"
