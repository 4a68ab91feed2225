"""Routes of the OpenAI-compatible API."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from adapter.api.choices import choices_of
from adapter.api.deps import batch_limit, count_prompts, request_context, services
from adapter.api.openai.errors import RESPONSE_NAMES
from adapter.api.openai.formatters import ChatFormatter, CompletionFormatter
from adapter.api.openai.requests import ChatCall, CompletionCall
from adapter.api.openai.response_calls import ResponseCall
from adapter.api.openai.response_events import RESPONSE_EVENTS, response_events
from adapter.api.openai.response_objects import Response, new_message_id
from adapter.api.openai.responses import ChatCompletion, Completion, ErrorAnswer, Model, ModelList
from adapter.api.openai.runner import CompletionRunner, Events
from adapter.api.openapi import stream_of
from adapter.api.schemas import error_responses
from adapter.api.sse import EventStream
from adapter.api.validation import check_batch_size, check_options
from adapter.engine.pool import EnginePool
from adapter.engine.streaming import StreamingRequest

router = APIRouter(prefix="/v1", tags=["openai"])

STARTED = int(time.time())


def _chunks(model: str) -> dict[int | str, dict[str, Any]]:
    """Describe a success in the OpenAPI document."""
    return _described(stream_of(model, "ErrorAnswer", other=("[DONE]",)))


def _described(stream: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    what = "The response; with `stream`, its chunks as server-sent events."
    return {200: {"description": what, "content": stream}}


_FAULTS = error_responses(ErrorAnswer)


@router.post("/completions", response_model=Completion, responses=_chunks("Completion") | _FAULTS)
async def completions(call: Request, body: CompletionCall) -> Completion | EventStream:
    """Continue each prompt, which the model sees without a chat template."""
    settings = services(call).settings
    pool = services(call).fleet.find(body.model)
    formatter = CompletionFormatter(pool.served_name)
    most = services(call).live.most_at_once(request_context(call).api_key)
    limit = batch_limit(call, most, "DLLM_MAX_LIVE")
    check_batch_size("prompt", body.prompts, limit)
    requests = body.requests(settings.max_gen_length)
    check_options(requests[0], settings)
    requests = [choice for one in requests for choice in choices_of(one, one.n)]
    check_batch_size("n", requests, limit)
    await count_prompts(call, len(requests))
    runner = CompletionRunner(call, pool)
    if body.stream:
        return await runner.stream(requests, formatter, body.streamed_usage)
    return formatter.whole(await runner.results(requests))


@router.post(
    "/chat/completions", response_model=ChatCompletion, responses=_chunks("ChatChunk") | _FAULTS
)
async def chat_completions(call: Request, body: ChatCall) -> ChatCompletion | EventStream:
    """Answer a conversation."""
    settings = services(call).settings
    call.state.length_name = body.length_name
    pool = services(call).fleet.find(body.model)
    formatter = ChatFormatter(pool.served_name, body.offer)
    request = body.request(default=settings.chat_max_tokens, longest=settings.max_gen_length)
    check_options(request, settings)
    requests = choices_of(request, request.n)
    most = services(call).live.most_at_once(request_context(call).api_key)
    check_batch_size("n", requests, batch_limit(call, most, "DLLM_MAX_LIVE"))
    await count_prompts(call, len(requests))
    runner = CompletionRunner(call, pool)
    if body.stream:
        return await runner.stream(requests, formatter, body.streamed_usage)
    return formatter.whole(await runner.results(requests))


@router.post(
    "/responses",
    response_model=Response,
    responses=_described(stream_of("ResponseEvent", events=RESPONSE_EVENTS)) | _FAULTS,
)
async def responses(call: Request, body: ResponseCall) -> Response | EventStream:
    """Answer a conversation, by OpenAI's newer call. Nothing is stored."""
    settings = services(call).settings
    call.state.length_name = RESPONSE_NAMES["gen_length"]
    pool = services(call).fleet.find(body.model)
    request = body.chat().request(default=settings.chat_max_tokens, longest=settings.max_gen_length)
    check_options(request, settings)
    runner, response = CompletionRunner(call, pool), Response.begun(body, pool.served_name)
    if not body.stream:
        (result,) = await runner.results([request])
        return response.ended(result, new_message_id())

    def events(running: Sequence[StreamingRequest], heartbeat: float, length: str) -> Events:
        return response_events(running[0], response, heartbeat=heartbeat, length=length)

    return await runner.stream_events([request], events)


@router.get("/models", response_model_exclude_none=True, responses=_FAULTS)
async def models(call: Request) -> ModelList:
    """List the models that calls may name."""
    pools = services(call).fleet.pools
    return ModelList(data=list(await asyncio.gather(*map(_model, pools))))


@router.get("/models/{model:path}", response_model_exclude_none=True, responses=_FAULTS)
async def one_model(model: str, call: Request) -> Model:
    """Return the model, if calls may name it."""
    if not model.strip("/"):
        raise HTTPException(404)  # of the list, with a slash too many
    return await _model(services(call).fleet.find(model))


async def _model(pool: EnginePool) -> Model:
    return Model(id=pool.served_name, created=STARTED, **asdict(await pool.describe()))
