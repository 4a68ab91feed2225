"""Readiness and liveness, for load balancers and orchestrators."""

from collections.abc import Iterable

from fastapi import APIRouter, Request, Response

from adapter.api.deps import services
from adapter.api.schemas import Health, Liveness, Readiness
from adapter.periodic import PeriodicTask

router = APIRouter(tags=["health"])


# GuideLLM, and probes that were written for vLLM, look here.
@router.get("/health", response_model_exclude_none=True, include_in_schema=False)
@router.get("/v1/health", response_model_exclude_none=True, responses={503: {"model": Health}})
async def health(request: Request, response: Response) -> Health:
    """Readiness: 200 while jobs and live calls can be taken, otherwise 503 with the reason.

    Jobs need the database, and wait for an engine. Streams and OpenAI calls need an engine only.
    With several models, one that responds is enough.
    """
    ours = services(request)
    jobs = Readiness.of(ours.database.outage or _stalled([*ours.tasks, *ours.fleet.loops]))
    models = {
        pool.served_name: Readiness.of(None if pool.state.ok else pool.state.reason)
        for pool in ours.fleet.pools
    }
    away = [model.reason for model in models.values() if model.reason is not None]
    live = Readiness.of(away[0] if len(away) == len(models) else None)
    reasons = [part.reason for part in (live, jobs) if part.reason is not None]
    if reasons:
        response.status_code = 503
    status = Readiness.of("; ".join(reasons) or None)
    return Health(
        status=status.status,
        reason=status.reason,
        jobs=jobs,
        live=live,
        models=models if len(models) > 1 else None,
    )


@router.get("/v1/livez", response_model_exclude_none=True, responses={503: {"model": Liveness}})
async def livez(request: Request, response: Response) -> Liveness:
    """Liveness: 200 while this process responds and its background tasks go on.

    It stays 200 while the engine or the database is away: a new process would not help.
    """
    ours = services(request)
    reason = _stalled([*ours.tasks, *ours.fleet.loops])
    if reason is not None:
        response.status_code = 503
        return Liveness(status="stalled", reason=reason)
    return Liveness(status="ok")


def _stalled(tasks: Iterable[PeriodicTask]) -> str | None:
    stalled = [f"{task.name} for {task.seconds_in_step:.0f} s" for task in tasks if task.stalled]
    return f"background tasks hang: {', '.join(stalled)}" if stalled else None
