"""Traces: a span for each call, and one for each request at Triton with its denoising steps.

Off unless DLLM_TRACING is on, which needs the extra `otel`. The trace context
of a caller reaches Triton in either case.
"""

import re
from collections.abc import Mapping
from contextvars import ContextVar

from adapter.errors import SettingsError
from adapter.types import Event

#: W3C trace context of what this task is doing; goes to Triton as a header.
TRACEPARENT: ContextVar[str | None] = ContextVar("traceparent", default=None)

WELL_FORMED = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Span:
    """Something that takes time; this one is told to nobody."""

    def __init__(self, traceparent: str | None) -> None:
        #: Trace context for whoever goes on.
        self.traceparent = traceparent

    def set(self, attributes: Mapping[str, str | int]) -> None:
        """Say more about it."""

    def step(self, event: Event) -> None:
        """The engine has sent an event."""

    def fail(self, error: BaseException) -> None:
        """It went wrong."""

    def end(self) -> None:
        """It is over."""


class Tracer:
    """Makes spans; this one makes none that anybody sees."""

    def call(self, name: str, headers: Mapping[str, str]) -> Span:  # noqa: ARG002
        """Begin the span of a call, in the caller's trace if there is one."""
        given = headers.get("traceparent", "")
        return Span(given if WELL_FORMED.fullmatch(given) else None)

    def request(self, request_id: str) -> Span:  # noqa: ARG002
        """Begin the span of a request at Triton, in the trace of this task."""
        return Span(TRACEPARENT.get())

    def close(self) -> None:
        """Send what is left to send."""


def make_tracer(*, enabled: bool) -> Tracer:
    """The tracer of the settings. Raises `SettingsError` where the extra is missing."""
    if not enabled:
        return Tracer()
    try:
        from adapter.telemetry.otel import exporting_tracer
    except ImportError as error:
        msg = f"DLLM_TRACING: needs the extra otel, pip install 'dllm-serve[otel]': {error}"
        raise SettingsError(msg) from error
    return exporting_tracer()
