"""Routes of the OpenAI-compatible API."""

import secrets
import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request

from adapter.api.deps import (
    ContextDep,
    PoolDep,
    SettingsDep,
    StreamingDep,
    batch_limit,
    count_prompts,
)
from adapter.api.openai.errors import ModelNotFound
from adapter.api.openai.formatters import ChatFormatter, CompletionFormatter
from adapter.api.openai.requests import ChatCall, CompletionCall
from adapter.api.openai.responses import ChatCompletion, Completion, ErrorAnswer, Model, ModelList
from adapter.api.openai.runner import CompletionRunner
from adapter.api.openapi import stream_of
from adapter.api.schemas import error_responses
from adapter.api.sse import EventStream
from adapter.api.validation import check_batch_size, check_options
from adapter.engine.pool import EnginePool
from adapter.settings import Settings

router = APIRouter(prefix="/v1", tags=["openai"])

STARTED = int(time.time())


def _chunks(model: str) -> dict[int | str, dict[str, Any]]:
    """Describe a success in the OpenAPI document."""
    return {
        200: {
            "description": "The response; with `stream`, its chunks as server-sent events.",
            "content": stream_of(model, "ErrorAnswer", other=("[DONE]",)),
        }
    }


_FAULTS = error_responses(ErrorAnswer)


async def _runner(
    request: Request, context: ContextDep, live: StreamingDep, settings: SettingsDep
) -> CompletionRunner:
    request_id = context.request_id or secrets.token_hex(8)
    return CompletionRunner(
        live,
        request,
        request_id=request_id,
        api_key=context.api_key,
        heartbeat=settings.heartbeat_interval,
    )


RunnerDep = Annotated[CompletionRunner, Depends(_runner)]


@router.post("/completions", response_model=Completion, responses=_chunks("Completion") | _FAULTS)
async def completions(
    call: Request,
    body: CompletionCall,
    runner: RunnerDep,
    settings: SettingsDep,
    live: StreamingDep,
    context: ContextDep,
) -> Completion | EventStream:
    """Continue each prompt, which the model sees without a chat template."""
    formatter = CompletionFormatter(_served(body.model, settings))
    limit = batch_limit(call, live.most_at_once(context.api_key), "DLLM_MAX_LIVE")
    check_batch_size("prompt", body.prompts, limit)
    requests = body.requests(settings.max_gen_length)
    check_options(requests[0], settings)
    await count_prompts(call, len(requests))
    if body.stream:
        return await runner.stream(requests, formatter, body.streamed_usage)
    return formatter.whole(await runner.results(requests))


@router.post(
    "/chat/completions", response_model=ChatCompletion, responses=_chunks("ChatChunk") | _FAULTS
)
async def chat_completions(
    call: Request, body: ChatCall, runner: RunnerDep, settings: SettingsDep
) -> ChatCompletion | EventStream:
    """Answer a conversation."""
    call.state.length_name = body.length_name
    formatter = ChatFormatter(_served(body.model, settings))
    request = body.request(default=settings.chat_max_tokens, longest=settings.max_gen_length)
    check_options(request, settings)
    if body.stream:
        return await runner.stream([request], formatter, body.streamed_usage)
    return formatter.whole(await runner.results([request]))


@router.get("/models", response_model_exclude_none=True, responses=_FAULTS)
async def models(pool: PoolDep, settings: SettingsDep) -> ModelList:
    """List the models that calls may name."""
    return ModelList(data=[await _model(settings.openai_model, pool)])


@router.get("/models/{model:path}", response_model_exclude_none=True, responses=_FAULTS)
async def one_model(model: str, pool: PoolDep, settings: SettingsDep) -> Model:
    """Return the model, if calls may name it."""
    if not model.strip("/"):
        raise HTTPException(404)  # of the list, with a slash too many
    return await _model(_served(model, settings), pool)


async def _model(name: str, pool: EnginePool) -> Model:
    return Model(id=name, created=STARTED, **asdict(await pool.describe()))


def _served(model: str, settings: Settings) -> str:
    """Return the model's name. Raises `ModelNotFound` for any other."""
    if model != settings.openai_model:
        msg = f"the model {model!r} does not exist; this server has {settings.openai_model!r}"
        raise ModelNotFound(msg)
    return model
