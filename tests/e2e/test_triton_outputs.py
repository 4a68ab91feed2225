"""What a caller gets is what it asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import tensors
from tests.support.servers import stub_of

FIELDS = {"text_input": "one", "gen_length": 4, "steps": 1}
CALLERS, CALLS = 24, 200


@pytest.mark.parametrize("model", ["dllm", pytest.param("dllm_unary", marks=pytest.mark.slow)])
def test_thousands_ask_for_one_output(triton: TritonServer, model: str) -> None:
    """Each gets that output and no other, and the model's process lives on.

    Outputs that no client requested were once dropped by the stub without Python's lock; that
    killed the process within 2,500 calls.
    """
    process = stub_of(triton, model)
    inputs = tensors(triton, triton_grpc, FIELDS)
    outputs = [triton_grpc.InferRequestedOutput("text_output")]

    async def ask(client: Any) -> Any:
        if model == "dllm_unary":
            return await client.infer(model, inputs, outputs=outputs)

        async def request() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": model, "inputs": inputs, "outputs": outputs}

        result, error = await anext(client.stream_infer(request()))
        assert error is None
        return result

    async def caller(client: Any) -> None:
        for _ in range(CALLS):
            response = (await ask(client)).get_response()
            assert [output.name for output in response.outputs] == ["text_output"]

    async def everybody() -> None:
        async with triton_grpc_aio.InferenceServerClient(triton.grpc_url) as client:
            await asyncio.gather(*(caller(client) for _ in range(CALLERS)))

    asyncio.run(everybody())
    assert process == stub_of(triton, model)
