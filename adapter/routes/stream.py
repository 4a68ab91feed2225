"""Watching a text being denoised."""

import secrets
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from adapter.connection import SETTLING_SECONDS, EventStream, unless_gone
from adapter.denoising import CanvasView, denoising_events
from adapter.deps import CallerDep, LiveDep, SettingsDep
from adapter.description import stream_of
from adapter.generation import Detail
from adapter.limits import check_limits
from adapter.problems import problems
from adapter.schemas import GenerateRequest

router = APIRouter(prefix="/v1", tags=["stream"])

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events `step`, then one `done` or one `error`; docs/streaming.md has them.",
        "content": stream_of("Step", "Done", "Failed", events=("step", "done", "error")),
    }
}


@router.post(
    "/generate/stream",
    response_class=StreamingResponse,
    responses=_EVENTS | problems(),
)
async def generate_stream(
    body: GenerateRequest,
    request: Request,
    caller: CallerDep,
    live: LiveDep,
    settings: SettingsDep,
) -> EventStream:
    """Denoise one prompt, step by step, as server-sent events.

    Hanging up cancels the request.
    """
    check_limits(body, settings)
    running = live.start(
        body.inputs(),
        request_id=caller.request_id or secrets.token_hex(8),
        detail=Detail.CANVAS,
        priority=body.priority,
        timeout=body.timeout,
    )
    try:
        await unless_gone(request, running.settled_in(SETTLING_SECONDS))
    except BaseException:
        await running.close()
        raise
    view = CanvasView(body.canvas_ids or ())
    events = denoising_events(running, view, heartbeat=settings.heartbeat_interval)
    return EventStream(events, running.close)
