"""Metrics for Prometheus."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from adapter.api.deps import services
from adapter.errors import StoreUnavailable
from adapter.telemetry.metrics import exposition

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Counters and timings of all workers, in Prometheus's text format."""
    try:
        counts = await services(request).jobs.count_active()
        active = {(state.value, model): count for (state, model), count in counts.items()}
    except StoreUnavailable:
        active = None  # still show all other figures
    return Response(await exposition(active), media_type=CONTENT_TYPE_LATEST)
