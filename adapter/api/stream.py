"""Watching a text being denoised."""

import secrets
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from adapter.api.canvas_events import CanvasView, denoising_events
from adapter.api.deps import CallerDep, SettingsDep, StreamingDep
from adapter.api.openapi import stream_of
from adapter.api.problems import problems
from adapter.api.schemas import GenerateRequest
from adapter.api.sse import SETTLING_SECONDS, EventStream, unless_gone
from adapter.api.validation import check_limits
from adapter.types import StreamDetail

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
    live: StreamingDep,
    settings: SettingsDep,
) -> EventStream:
    """Denoise one prompt, step by step, as server-sent events.

    Hanging up cancels the request.
    """
    check_limits(body, settings)
    running = live.start(
        body.inputs(),
        request_id=caller.request_id or secrets.token_hex(8),
        detail=StreamDetail.CANVAS,
        priority=body.priority,
        timeout=body.timeout,
    )
    try:
        await unless_gone(request, running.wait_accepted(SETTLING_SECONDS))
    except BaseException:
        await running.close()
        raise
    view = CanvasView(body.canvas_ids or ())
    events = denoising_events(running, view, heartbeat=settings.heartbeat_interval)
    return EventStream(events, running.close)
