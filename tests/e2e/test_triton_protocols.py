"""The ways of tritonclient, all of which lead to the same answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from dllm_engine import LLM, SamplingParams

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import Answer, GrpcStream, generate, post, tensors
from tests.support.checkpoints import BOS

FIELDS = {"text_input": "any way", "temperature": 0.7, "gen_length": 20, "seed": 9}


def test_grpc_stream(triton: TritonServer) -> None:
    """A gRPC stream brings the answer, and with `stream` every step before it."""
    expected = generate(triton, **FIELDS)
    with GrpcStream(triton, FIELDS) as stream:
        assert len(list(stream)) == 1
    with GrpcStream(triton, FIELDS | {"stream": True}) as stream:
        steps = list(stream)
    assert len(steps) == expected.usage[2]
    assert steps[-1].token_ids == expected.token_ids


def test_http_infer(triton: TritonServer) -> None:
    """`tritonclient.http` infers on `dllm_unary` what `dllm` answers."""
    with triton_http.InferenceServerClient(triton.http_url, network_timeout=120) as client:
        result = client.infer("dllm_unary", tensors(triton, triton_http, FIELDS))
    assert Answer.from_result(result).token_ids == generate(triton, **FIELDS).token_ids


def test_grpc_infer(triton: TritonServer) -> None:
    """`tritonclient.grpc` infers on `dllm_unary` what `dllm` answers."""
    with triton_grpc.InferenceServerClient(triton.grpc_url) as client:
        result = client.infer("dllm_unary", tensors(triton, triton_grpc, FIELDS))
    assert Answer.from_result(result).token_ids == generate(triton, **FIELDS).token_ids


def test_unary_generate(triton: TritonServer) -> None:
    """The generate endpoint works on `dllm_unary` as it does on `dllm`."""
    assert generate(triton, model="dllm_unary", **FIELDS) == generate(triton, **FIELDS)


def test_many_unary_calls(triton: TritonServer, llm: LLM) -> None:
    """Thirty-two unary calls at once are all answered, each with its own answer."""
    prompts = [f"prompt {i}" for i in range(32)]
    sampling = [SamplingParams(gen_length=8 + i, temperature=0.8, seed=i) for i in range(32)]
    expected = [one.token_ids.tolist() for one in llm.generate(prompts, sampling, progress=False)]
    with triton_http.InferenceServerClient(
        triton.http_url, concurrency=32, connection_timeout=120, network_timeout=120
    ) as client:
        pending = []
        for prompt, one in zip(prompts, sampling, strict=True):
            fields = {
                "text_input": prompt,
                "gen_length": one.gen_length,
                "temperature": one.temperature,
                "seed": one.seed,
            }
            inputs = tensors(triton, triton_http, fields)
            pending.append(client.async_infer("dllm_unary", inputs))
        answers = [Answer.from_result(call.get_result()) for call in pending]
    assert [answer.token_ids for answer in answers] == expected


def test_many_short_requests(triton: TritonServer) -> None:
    """Hundreds of requests that end as soon as they begin are all answered."""
    fields = {"text_input": "hi", "gen_length": 1}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(triton, fields).status_code, range(400)))
    assert answers == [200] * 400
    assert triton.running


@pytest.mark.parametrize("model", ["dllm", "dllm_unary"])
def test_id_in_a_generate_body_is_the_requests_id(triton: TritonServer, model: str) -> None:
    """Triton's `id` is accepted and repeated in the answer; another parameter beside it is not."""
    fields = {"text_input": "hi", "gen_length": 4, "id": "order-17"}
    response = post(triton, fields, model=model)
    assert (response.status_code, response.json()["id"]) == (200, "order-17")
    assert post(triton, fields | {"idx": "order-17"}, model=model).status_code == 400


@pytest.mark.parametrize("model", ["dllm", "dllm_unary"])
@pytest.mark.parametrize("name", ["input_ids", "canvas_ids"])
def test_more_ids_than_any_sequence_has_are_refused(
    triton: TritonServer, model: str, name: str
) -> None:
    """A list that cannot fit is refused by its length, before its ids are looked at."""
    fields = {"input_ids": [1], "gen_length": 4, name: [1] * 100_000}
    response = post(triton, fields, model=model)
    assert response.status_code == 400
    assert response.json()["error"] == f"{name}: must be at most 1024 ids; got 100000"


@pytest.mark.parametrize("gap", [{}, {"suffix": " and so on"}])
def test_no_ids_stand_for_the_start_token(triton: TritonServer, gap: dict[str, str]) -> None:
    """An empty `input_ids` asks for a text from nothing, or for what stands before a suffix."""
    fields = {"gen_length": 8, "seed": 3, "temperature": 1.0} | gap
    empty = generate(triton, **fields, input_ids=[])
    assert empty == generate(triton, **fields, input_ids=[BOS])
    assert post(triton, fields | {"text_input": ""}).status_code == 400
