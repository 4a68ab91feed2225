"""A client that goes away, or that is asked to, frees its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest
import tritonclient.http as triton_http

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import LONG, Answer, GrpcStream, events, open_http_stream, post, tensors
from tests.support.servers import eventually, metric, settled_counters

CANCELLED = "dllm_requests_cancelled_total"
FINISHED = "dllm_requests_finished_total"


@contextmanager
def grpc_stream(server: TritonServer) -> Iterator[None]:
    """A gRPC stream, cancelled on leaving."""
    with GrpcStream(server, LONG | {"stream": True}) as stream:
        next(iter(stream))
        yield


@contextmanager
def http_stream(server: TritonServer) -> Iterator[None]:
    """A server-sent event stream whose connection is dropped on leaving."""
    with open_http_stream(server, LONG) as response:
        reader = events(response)
        next(reader)
        yield


@pytest.mark.parametrize("way", [grpc_stream, http_stream])
def test_leaving_frees_the_place(
    triton: TritonServer, way: Callable[[TritonServer], AbstractContextManager[None]]
) -> None:
    """When its client goes away a request ends at the next step instead of running on."""
    before = settled_counters(triton)
    with way(triton):
        pass
    eventually(
        lambda: metric(triton, CANCELLED) == before[CANCELLED] + 1, "the request is cancelled"
    )
    assert metric(triton, FINISHED) == before[FINISHED]
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "its place is free")


def test_of_many_that_leave_none_is_forgotten(triton: TritonServer) -> None:
    """Many callers leave at once, and each of their places is free."""
    many = 12
    before = settled_counters(triton)
    with ExitStack() as stack:
        for _ in range(many):
            stack.enter_context(grpc_stream(triton))
    eventually(lambda: metric(triton, CANCELLED) == before[CANCELLED] + many, "all are cancelled")
    assert metric(triton, FINISHED) == before[FINISHED]


def test_cancel_by_id(triton: TritonServer) -> None:
    """A request that names another's id ends that request alone, even a unary call."""
    with (
        triton_http.InferenceServerClient(triton.http_url, network_timeout=120) as client,
        GrpcStream(triton, LONG | {"stream": True, "gen_length": 450}) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        next(iter(other))
        inputs = tensors(triton, triton_http, LONG)
        mine = pool.submit(client.infer, "dllm_unary", inputs, request_id="mine")
        while not mine.done():  # the first may come before the request that it is to end
            response = post(triton, {"cancel": "mine"})
            assert response.status_code == 200, response.text
            assert response.json()["finish_reason"] == "cancelled"
        assert Answer.from_result(mine.result()).finish_reason == "cancelled"
        assert list(other)[-1].finish_reason == "length"
    assert post(triton, {"cancel": "unknown"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"cancel": "", "gen_length": 4}, "combined"),
        ({"cancel": ""}, "empty"),
        ({"cancel": "x" * 5000}, "at most 4096 characters"),
    ],
)
def test_cancel_needs_an_id_and_nothing_else(
    triton: TritonServer, fields: dict[str, object], rule: str
) -> None:
    """Ambiguous cancels are refused."""
    response = post(triton, fields)
    assert response.status_code == 400
    assert response.json()["error"].startswith("cancel: ")
    assert rule in response.json()["error"]
