"""Route that streams the canvas while a text is denoised."""

import secrets
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from adapter.api.canvas_events import CanvasView, denoising_events
from adapter.api.deps import request_context, services
from adapter.api.openapi import stream_of
from adapter.api.schemas import GenerateRequest, error_responses
from adapter.api.sse import FIRST_EVENT_TIMEOUT, EventStream, cancel_on_disconnect
from adapter.api.validation import check_limits, check_one_choice
from adapter.types import StreamDetail

router = APIRouter(prefix="/v1", tags=["stream"])

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events `step`, then one `done` or one `error`; see docs/streaming.md.",
        "content": stream_of("Step", "Done", "Failed", events=("step", "done", "error")),
    }
}


@router.post(
    "/generate/stream",
    response_class=StreamingResponse,
    responses=_EVENTS | error_responses(),
)
async def generate_stream(body: GenerateRequest, request: Request) -> EventStream:
    """Denoise one prompt and stream each step as a server-sent event.

    Closing the connection cancels the request.
    """
    context, settings = request_context(request), services(request).settings
    check_limits(body, settings)
    check_one_choice(body)
    running = services(request).live.start(
        body.inputs(),
        request_id=context.request_id or secrets.token_hex(8),
        detail=StreamDetail.CANVAS,
        priority=body.priority,
        timeout=body.timeout,
        api_key=context.api_key,
        pool=services(request).fleet.find(body.model),
    )
    try:
        await cancel_on_disconnect(request, running.wait_accepted(FIRST_EVENT_TIMEOUT))
    except BaseException:
        await running.close()
        raise
    view = CanvasView(body.canvas_ids or ())
    events = denoising_events(running, view, heartbeat=settings.heartbeat_interval)
    return EventStream(events, running.close)
