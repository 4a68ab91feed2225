"""Python client of dLLM-Serve.

    from dllm_client import Client

    with Client("http://localhost:8000") as client:
        print(client.generate("Tell me about AI", gen_length=128))
        for event in client.stream("Tell me about AI"):  # steps, then the answer
            print(event)

`AsyncClient` has the same methods for asyncio. `dllm_client.triton` talks to Triton directly.
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
    StreamError,
    TimeoutError,
    UnavailableError,
    UnexpectedResponseError,
)
from dllm_client._types import (
    Answer,
    Block,
    Committed,
    Outcome,
    Params,
    Prompt,
    Request,
    Result,
    Sampling,
    Status,
    Step,
    TokenDetail,
    TopLogprob,
    Usage,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "Block",
    "Client",
    "Committed",
    "DllmError",
    "JobCancelledError",
    "JobError",
    "JobFailedError",
    "NotFoundError",
    "Outcome",
    "Params",
    "Prompt",
    "RateLimitedError",
    "Request",
    "ResponseError",
    "Result",
    "Sampling",
    "ServerError",
    "Status",
    "Step",
    "StreamError",
    "TimeoutError",
    "TokenDetail",
    "TopLogprob",
    "UnavailableError",
    "UnexpectedResponseError",
    "Usage",
]
