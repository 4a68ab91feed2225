"""Routes of jobs: submit, poll, cancel."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request

from adapter.api.choices import choices_of
from adapter.api.deps import batch_limit, count_prompts, request_context, services
from adapter.api.schemas import (
    BatchRequest,
    GenerateRequest,
    Result,
    SchedulingParams,
    Submitted,
    error_responses,
)
from adapter.api.sse import cancel_on_disconnect
from adapter.api.validation import check_batch, check_batch_size, check_limits
from adapter.jobs.job import JobOptions

router = APIRouter(prefix="/v1", tags=["jobs"], responses=error_responses())

MAX_WAIT_SECONDS = 60

Wait = Annotated[
    float,
    Query(
        ge=0,
        le=MAX_WAIT_SECONDS,
        allow_inf_nan=False,
        description="seconds to wait for the result; 429 beyond DLLM_MAX_HELD_POLLS waiting polls",
    ),
]


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="sending the same body again with this key returns the same ids, not new jobs",
    ),
]


@router.post("/generate")
async def generate(
    body: GenerateRequest, request: Request, key: IdempotencyKey = None
) -> Submitted:
    """Submit one prompt, as `n` jobs."""
    check_limits(body, services(request).settings)
    options = _options(body, request)
    inputs = [choice.inputs() for choice in choices_of(body, body.n)]
    most = services(request).jobs.most_at_once(options.api_key)
    check_batch_size("n", inputs, batch_limit(request, most, "DLLM_MAX_QUEUED_JOBS"))
    await count_prompts(request, body.n)
    ids = await services(request).jobs.submit(inputs, options, key=key)
    return Submitted(request_ids=ids)


@router.post("/generate_batch")
async def generate_batch(
    body: BatchRequest, request: Request, key: IdempotencyKey = None
) -> Submitted:
    """Submit several prompts; either all are accepted or none."""
    options = _options(body, request)
    most = services(request).jobs.most_at_once(options.api_key)
    limit = batch_limit(request, most, "DLLM_MAX_QUEUED_JOBS")
    check_batch(body, limit, services(request).settings)
    await count_prompts(request, len(body.prompts))
    ids = await services(request).jobs.submit(body.inputs(), options, key=key)
    return Submitted(request_ids=ids)


@router.get("/result/{request_id}", response_model_exclude_unset=True)
async def result(request_id: int, request: Request, wait: Wait = 0.0) -> Result:
    """Return the state of a job, with its text once finished."""
    job = services(request).jobs.result(
        request_id, api_key=request_context(request).api_key, wait=wait
    )
    return Result.of(await (cancel_on_disconnect(request, job) if wait else job))


@router.delete("/result/{request_id}", response_model_exclude_unset=True)
async def cancel(request_id: int, request: Request) -> Result:
    """Cancel a job; a finished one is returned unchanged."""
    job = await services(request).jobs.cancel(request_id, api_key=request_context(request).api_key)
    return Result.of(job)


def _options(body: SchedulingParams, request: Request) -> JobOptions:
    """Options for the call's jobs. Raises `UnknownModel`, `Unavailable`."""
    model = None if body.model is None else services(request).fleet.find(body.model).model
    return request_context(request).options(body.priority, body.timeout, model)
