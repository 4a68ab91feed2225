"""Python client of dLLM-Serve.

    from dllm_client import Client

    with Client("http://localhost:8000") as client:
        print(client.generate("Tell me about AI", gen_length=128))

`AsyncClient` is the same for asyncio. `dllm_client.triton` talks to Triton directly.
"""

from dllm_client._client import AsyncClient, Client
from dllm_client._errors import (
    AuthenticationError,
    BadRequestError,
    DllmError,
    JobCancelledError,
    JobError,
    JobFailedError,
    NotFoundError,
    RateLimitedError,
    ResponseError,
    ServerError,
    TimeoutError,
    UnavailableError,
    UnexpectedResponseError,
)
from dllm_client._types import Params, Result, Sampling, Status

__all__ = [
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "DllmError",
    "JobCancelledError",
    "JobError",
    "JobFailedError",
    "NotFoundError",
    "Params",
    "RateLimitedError",
    "ResponseError",
    "Result",
    "Sampling",
    "ServerError",
    "Status",
    "TimeoutError",
    "UnavailableError",
    "UnexpectedResponseError",
]
