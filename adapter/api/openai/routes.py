"""The calls that OpenAI's clients make."""

import secrets
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from adapter.api.deps import CallerDep, SettingsDep, StreamingDep
from adapter.api.openai.errors import ModelNotFound
from adapter.api.openai.formatters import ChatShape, CompletionShape
from adapter.api.openai.requests import ChatCall, CompletionCall
from adapter.api.openai.responses import ChatCompletion, Completion, ErrorAnswer, Model, ModelList
from adapter.api.openai.runner import Runner
from adapter.api.openapi import stream_of
from adapter.api.problems import problems
from adapter.api.sse import EventStream
from adapter.api.validation import check_batch_size, check_limits
from adapter.settings import Settings

router = APIRouter(prefix="/v1", tags=["openai"])

STARTED = int(time.time())


def _chunks(model: str) -> dict[int | str, dict[str, Any]]:
    """What the description of a call says of a success."""
    return {
        200: {
            "description": "The answer; with `stream`, chunks of it as server-sent events.",
            "content": stream_of(model, "ErrorAnswer", other=("[DONE]",)),
        }
    }


_FAULTS = problems(ErrorAnswer)


async def _runner(
    request: Request, caller: CallerDep, live: StreamingDep, settings: SettingsDep
) -> Runner:
    request_id = caller.request_id or secrets.token_hex(8)
    return Runner(live, request, request_id=request_id, heartbeat=settings.heartbeat_interval)


RunnerDep = Annotated[Runner, Depends(_runner)]


@router.post("/completions", response_model=Completion, responses=_chunks("Completion") | _FAULTS)
async def completions(
    body: CompletionCall, runner: RunnerDep, settings: SettingsDep
) -> Completion | EventStream:
    """Go on writing after each prompt, which the model sees as it is."""
    shape = CompletionShape(_served(body.model, settings))
    requests = body.requests()
    check_batch_size("prompt", requests, settings)
    for request in requests:
        check_limits(request, settings)
    if body.stream:
        return await runner.stream(requests, shape, includes_usage=body.includes_usage)
    return shape.whole(await runner.results(requests))


@router.post(
    "/chat/completions", response_model=ChatCompletion, responses=_chunks("ChatChunk") | _FAULTS
)
async def chat_completions(
    call: Request, body: ChatCall, runner: RunnerDep, settings: SettingsDep
) -> ChatCompletion | EventStream:
    """Answer a conversation."""
    call.state.length_name = body.length_name
    shape = ChatShape(_served(body.model, settings))
    request = body.request(min(settings.chat_max_tokens, settings.max_gen_length))
    check_limits(request, settings)
    if body.stream:
        return await runner.stream([request], shape, includes_usage=body.includes_usage)
    return shape.whole(await runner.results([request]))


@router.get("/models", responses=_FAULTS)
async def models(settings: SettingsDep) -> ModelList:
    """The models that may be asked for."""
    return ModelList(data=[Model(id=settings.openai_model, created=STARTED)])


@router.get("/models/{model:path}", responses=_FAULTS)
async def one_model(model: str, settings: SettingsDep) -> Model:
    """The model, if it may be asked for."""
    return Model(id=_served(model, settings), created=STARTED)


def _served(model: str, settings: Settings) -> str:
    """The model's name. Raises `ModelNotFound` if it is another."""
    if model != settings.openai_model:
        msg = f"the model {model!r} does not exist here; {settings.openai_model!r} does"
        raise ModelNotFound(msg)
    return model
