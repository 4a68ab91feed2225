"""What routes are given; asynchronous, as the framework hands all else to threads.

The framework takes its time for each of these, so that the routes of jobs, which are called most,
take what they need from the call themselves.
"""

from typing import Annotated, cast

from fastapi import Depends, Request

from adapter.api.caller import Caller, caller_of
from adapter.engine.pool import EnginePool
from adapter.engine.streaming import StreamingRequests
from adapter.jobs.service import JobService
from adapter.settings import Settings


def settings_of(request: Request) -> Settings:
    """The settings of the application that is called."""
    return cast(Settings, request.app.state.settings)


def jobs_of(request: Request) -> JobService:
    """Its jobs."""
    return cast(JobService, request.app.state.jobs)


async def _caller(request: Request) -> Caller:
    return caller_of(request)


async def _settings(request: Request) -> Settings:
    return settings_of(request)


async def _jobs(request: Request) -> JobService:
    return jobs_of(request)


async def _live(request: Request) -> StreamingRequests:
    return cast(StreamingRequests, request.app.state.live)


async def _pool(request: Request) -> EnginePool:
    return cast(EnginePool, request.app.state.pool)


CallerDep = Annotated[Caller, Depends(_caller)]
SettingsDep = Annotated[Settings, Depends(_settings)]
JobsDep = Annotated[JobService, Depends(_jobs)]
StreamingDep = Annotated[StreamingRequests, Depends(_live)]
PoolDep = Annotated[EnginePool, Depends(_pool)]
