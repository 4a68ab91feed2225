"""Submitting, polling, cancelling."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request

from adapter.connection import unless_gone
from adapter.deps import CallerDep, JobsDep, SettingsDep
from adapter.limits import check_limits
from adapter.problems import problems
from adapter.schemas import BatchRequest, GenerateRequest, Result, Submitted

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
    body: GenerateRequest,
    jobs: JobsDep,
    settings: SettingsDep,
    caller: CallerDep,
    key: IdempotencyKey = None,
) -> Submitted:
    """Submit one prompt."""
    check_limits(body, settings)
    terms = caller.terms(body.priority, body.timeout)
    return Submitted(request_ids=await jobs.submit([body.inputs()], terms, key=key))


@router.post("/generate_batch")
async def generate_batch(
    body: BatchRequest,
    jobs: JobsDep,
    settings: SettingsDep,
    caller: CallerDep,
    key: IdempotencyKey = None,
) -> Submitted:
    """Submit several prompts: all are accepted, or none."""
    check_limits(body, settings)
    terms = caller.terms(body.priority, body.timeout)
    return Submitted(request_ids=await jobs.submit(body.inputs(), terms, key=key))


@router.get("/result/{request_id}", response_model_exclude_unset=True)
async def result(
    request_id: int, request: Request, jobs: JobsDep, caller: CallerDep, wait: Wait = 0.0
) -> Result:
    """The state of a job, and its text once it is finished."""
    job = jobs.result(request_id, api_key=caller.api_key, wait=wait)
    return Result.of(await (unless_gone(request, job) if wait else job))


@router.delete("/result/{request_id}", response_model_exclude_unset=True)
async def cancel(request_id: int, jobs: JobsDep, caller: CallerDep) -> Result:
    """Cancel a job; one that is done stays as it is."""
    return Result.of(await jobs.cancel(request_id, api_key=caller.api_key))
