"""Gives routes a call's context, its share of the limits, and the application's services.

These are plain functions: FastAPI's own dependencies cost time at each call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from fastapi import Request

from adapter.api.validation import BatchLimit
from adapter.auth.rate_limit import Quota, RateLimiter
from adapter.db.database import Database
from adapter.engine.fleet import Fleet
from adapter.engine.streaming import StreamingRequests
from adapter.jobs.job import JobOptions
from adapter.jobs.service import JobService
from adapter.periodic import PeriodicTask
from adapter.settings import Settings
from adapter.types import DEFAULT_PRIORITY


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Key, id and client address of a call, set by the middleware."""

    #: Name of the API key; None where no keys are required.
    api_key: str | None = None
    #: `X-Request-ID`: the client's, or a generated one.
    request_id: str = ""
    #: W3C trace context of the call's span.
    traceparent: str | None = None

    def options(
        self,
        priority: int = DEFAULT_PRIORITY,
        timeout: float | None = None,
        model: str | None = None,
    ) -> JobOptions:
        """Options for the jobs that this call submits; `model` is a name at Triton."""
        return JobOptions(
            priority, timeout, self.api_key, self.request_id or None, self.traceparent, model
        )


def request_context(request: Request) -> RequestContext:
    """The context of this call."""
    state = request.state
    return RequestContext(
        api_key=getattr(state, "api_key", None),
        request_id=getattr(state, "request_id", ""),
        traceparent=getattr(state, "traceparent", None),
    )


class Services(Protocol):
    """The application's services; `adapter.app` makes them."""

    settings: Settings
    database: Database
    rate_limiter: RateLimiter | None
    fleet: Fleet
    jobs: JobService
    live: StreamingRequests
    #: Background tasks, which have to go on.
    tasks: Sequence[PeriodicTask]


def services(request: Request) -> Services:
    """The services of the application that got this call."""
    return cast(Services, request.app.state)


def batch_limit(request: Request, most: int, setting: str) -> BatchLimit:
    """The most prompts that this call may have; a call with more could never be admitted.

    `most` is how many its key may hold, and `setting` has the limit for all keys.
    """
    if request_context(request).api_key is not None:
        setting += ", DLLM_KEY_SHARE"
    limits = [
        BatchLimit(services(request).settings.max_batch_size, "DLLM_MAX_BATCH_SIZE"),
        BatchLimit(most, setting),
    ]
    if (limiter := services(request).rate_limiter) is not None:
        limits.append(BatchLimit(limiter.most_at_once, "DLLM_RATE_LIMIT"))
    return min(limits, key=lambda limit: limit.most)


async def count_prompts(request: Request, prompts: int) -> None:
    """Count the prompts of a call for the rate limit; its middleware has counted the first one.

    Raises `RateLimited`.
    """
    if services(request).rate_limiter is not None and prompts > 1:
        await request.state.quota.take(prompts - 1)


async def uncount(request: Request) -> None:
    """Give back what a refused call took from the rate limit."""
    quota: Quota | None = getattr(request.state, "quota", None)
    if quota is not None:
        await quota.give_back()
