"""What routes are given."""

from typing import Annotated, cast

from fastapi import Depends, Request

from adapter.health import EngineMonitor
from adapter.jobs.service import JobService
from adapter.settings import Settings


def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


def _jobs(request: Request) -> JobService:
    return cast(JobService, request.app.state.jobs)


def _monitor(request: Request) -> EngineMonitor:
    return cast(EngineMonitor, request.app.state.monitor)


SettingsDep = Annotated[Settings, Depends(_settings)]
JobsDep = Annotated[JobService, Depends(_jobs)]
MonitorDep = Annotated[EngineMonitor, Depends(_monitor)]
