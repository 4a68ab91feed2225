"""Readiness and liveness, for load balancers and orchestrators."""

from typing import Literal

from fastapi import APIRouter, Response

from adapter.api.deps import DatabaseDep, PoolDep
from adapter.api.schemas import Health
from adapter.errors import StoreUnavailable

router = APIRouter(prefix="/v1", tags=["health"])


@router.get("/health", response_model_exclude_none=True, responses={503: {"model": Health}})
async def health(pool: PoolDep, database: DatabaseDep, response: Response) -> Health:
    """Readiness: 200 while an engine and the database answer, 503 with the reason otherwise."""
    state = pool.state
    reason = state.reason
    if state.ok:
        try:
            await database.ping()
        except StoreUnavailable as error:
            reason = str(error)
        else:
            return Health(status="ok")
    response.status_code = 503
    return Health(status="unavailable", reason=reason)


@router.get("/livez")
async def livez() -> dict[str, Literal["ok"]]:
    """Liveness: 200 while this process responds, whatever the engine's state."""
    return {"status": "ok"}
