"""What routes are given; asynchronous, as the framework hands all else to threads."""

from typing import Annotated, cast

from fastapi import Depends, Request

from adapter.caller import Caller, caller_of
from adapter.jobs.service import JobService
from adapter.live import LiveRequests
from adapter.pool import EnginePool
from adapter.settings import Settings


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


async def _jobs(request: Request) -> JobService:
    return cast(JobService, request.app.state.jobs)


async def _live(request: Request) -> LiveRequests:
    return cast(LiveRequests, request.app.state.live)


async def _pool(request: Request) -> EnginePool:
    return cast(EnginePool, request.app.state.pool)


CallerDep = Annotated[Caller, Depends(caller_of)]
SettingsDep = Annotated[Settings, Depends(_settings)]
JobsDep = Annotated[JobService, Depends(_jobs)]
LiveDep = Annotated[LiveRequests, Depends(_live)]
PoolDep = Annotated[EnginePool, Depends(_pool)]
