"""Dependencies of the routes: the caller, the settings, and the services of the application.

They are asynchronous because FastAPI runs other dependencies in threads. FastAPI also spends time
on each of them, so the routes of jobs, which are called most, use the plain functions instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from adapter.api.validation import BatchLimit
from adapter.auth.rate_limit import Quota, RateLimiter
from adapter.db.database import Database
from adapter.engine.pool import EnginePool
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

    def options(self, priority: int = DEFAULT_PRIORITY, timeout: float | None = None) -> JobOptions:
        """Options for the jobs that this call submits."""
        return JobOptions(
            priority, timeout, self.api_key, self.request_id or None, self.traceparent
        )


def request_context(request: Request) -> RequestContext:
    """The context of this call."""
    state = request.state
    return RequestContext(
        api_key=getattr(state, "api_key", None),
        request_id=getattr(state, "request_id", ""),
        traceparent=getattr(state, "traceparent", None),
    )


def settings_of(request: Request) -> Settings:
    """The application's settings."""
    return cast(Settings, request.app.state.settings)


def jobs_of(request: Request) -> JobService:
    """The application's jobs."""
    return cast(JobService, request.app.state.jobs)


def batch_limit(request: Request, most: int, setting: str) -> BatchLimit:
    """The most prompts that this call may have; a call with more could never be admitted.

    `most` is how many its key may hold, and `setting` has the limit for all keys.
    """
    if request_context(request).api_key is not None:
        setting += ", DLLM_KEY_SHARE"
    limits = [
        BatchLimit(settings_of(request).max_batch_size, "DLLM_MAX_BATCH_SIZE"),
        BatchLimit(most, setting),
    ]
    if (limiter := _limiter(request)) is not None:
        limits.append(BatchLimit(limiter.most_at_once, "DLLM_RATE_LIMIT"))
    return min(limits, key=lambda limit: limit.most)


async def count_prompts(request: Request, prompts: int) -> None:
    """Count the prompts of a call for the rate limit; its middleware has counted the first one.

    Raises `RateLimited`.
    """
    limiter = _limiter(request)
    if limiter is not None and prompts > 1:
        await request.state.quota.take(prompts - 1)


async def uncount(request: Request) -> None:
    """Give back what a refused call took from the rate limit."""
    quota: Quota | None = getattr(request.state, "quota", None)
    if quota is not None:
        await quota.give_back()


def _limiter(request: Request) -> RateLimiter | None:
    return cast(RateLimiter | None, request.app.state.rate_limiter)


async def _context(request: Request) -> RequestContext:
    return request_context(request)


async def _settings(request: Request) -> Settings:
    return settings_of(request)


async def _jobs(request: Request) -> JobService:
    return jobs_of(request)


async def _live(request: Request) -> StreamingRequests:
    return cast(StreamingRequests, request.app.state.live)


async def _database(request: Request) -> Database:
    return cast(Database, request.app.state.database)


async def _tasks(request: Request) -> Sequence[PeriodicTask]:
    return cast(Sequence[PeriodicTask], request.app.state.tasks)


async def _pool(request: Request) -> EnginePool:
    return cast(EnginePool, request.app.state.pool)


ContextDep = Annotated[RequestContext, Depends(_context)]
SettingsDep = Annotated[Settings, Depends(_settings)]
JobsDep = Annotated[JobService, Depends(_jobs)]
DatabaseDep = Annotated[Database, Depends(_database)]
StreamingDep = Annotated[StreamingRequests, Depends(_live)]
TasksDep = Annotated[Sequence[PeriodicTask], Depends(_tasks)]
PoolDep = Annotated[EnginePool, Depends(_pool)]
