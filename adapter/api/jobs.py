"""Submitting, polling, cancelling."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request

from adapter.api.caller import caller_of
from adapter.api.deps import jobs_of, settings_of
from adapter.api.problems import problems
from adapter.api.schemas import BatchRequest, GenerateRequest, Result, Submitted
from adapter.api.sse import unless_gone
from adapter.api.validation import check_limits

router = APIRouter(prefix="/v1", tags=["jobs"], responses=problems())

MAX_WAIT_SECONDS = 60

Wait = Annotated[
    float,
    Query(
        ge=0,
        le=MAX_WAIT_SECONDS,
        allow_inf_nan=False,
        description="seconds to hold the poll; 429 where as many as may are held already",
    ),
]


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="The same body under the same key is accepted once: the answer is the same ids",
    ),
]


@router.post("/generate")
async def generate(
    body: GenerateRequest, request: Request, key: IdempotencyKey = None
) -> Submitted:
    """Submit one prompt."""
    check_limits(body, settings_of(request))
    options = caller_of(request).options(body.priority, body.timeout)
    ids = await jobs_of(request).submit([body.inputs()], options, key=key)
    return Submitted(request_ids=ids)


@router.post("/generate_batch")
async def generate_batch(
    body: BatchRequest, request: Request, key: IdempotencyKey = None
) -> Submitted:
    """Submit several prompts: all are accepted, or none."""
    check_limits(body, settings_of(request))
    options = caller_of(request).options(body.priority, body.timeout)
    ids = await jobs_of(request).submit(body.inputs(), options, key=key)
    return Submitted(request_ids=ids)


@router.get("/result/{request_id}", response_model_exclude_unset=True)
async def result(request_id: int, request: Request, wait: Wait = 0.0) -> Result:
    """The state of a job, and its text once it is finished."""
    job = jobs_of(request).result(request_id, api_key=caller_of(request).api_key, wait=wait)
    return Result.of(await (unless_gone(request, job) if wait else job))


@router.delete("/result/{request_id}", response_model_exclude_unset=True)
async def cancel(request_id: int, request: Request) -> Result:
    """Cancel a job; one that is done stays as it is."""
    job = await jobs_of(request).cancel(request_id, api_key=caller_of(request).api_key)
    return Result.of(job)
