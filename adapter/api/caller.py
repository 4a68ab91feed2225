"""Who makes a call; the middleware finds it out, and routes are given it."""

from dataclasses import dataclass

from fastapi import Request

from adapter.jobs.job import JobOptions
from adapter.types import DEFAULT_PRIORITY


@dataclass(frozen=True, slots=True)
class Caller:
    """What is known about a call besides its body."""

    #: Name of the API key; None where no keys are asked for.
    api_key: str | None = None
    #: `X-Request-ID`, the caller's or one of ours.
    request_id: str = ""
    #: W3C trace context of the call's span.
    traceparent: str | None = None

    def options(self, priority: int = DEFAULT_PRIORITY, timeout: float | None = None) -> JobOptions:
        """How jobs of this call are submitted."""
        return JobOptions(
            priority, timeout, self.api_key, self.request_id or None, self.traceparent
        )


def caller_of(request: Request) -> Caller:
    """The caller of this request."""
    state = request.state
    return Caller(
        api_key=getattr(state, "api_key", None),
        request_id=getattr(state, "request_id", ""),
        traceparent=getattr(state, "traceparent", None),
    )
