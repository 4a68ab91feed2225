"""A client that goes away frees its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import LONG, GrpcStream, events, open_http_stream
from tests.support.servers import eventually, metric


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


@contextmanager
def http_generate(server: TritonServer) -> Iterator[None]:
    """A plain request whose client loses patience."""
    with pytest.raises(requests.ReadTimeout):
        requests.post(
            f"http://{server.http_url}/v2/models/dllm/generate", json=LONG, timeout=(30, 1)
        )
    yield


@pytest.mark.parametrize("way", [grpc_stream, http_stream, http_generate])
def test_leaving_frees_the_place(triton: TritonServer, way: object) -> None:
    """When its client goes away a request ends at the next step instead of running on."""
    assert callable(way)
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "the engine is idle")
    cancelled = metric(triton, "dllm_requests_cancelled_total")
    finished = metric(triton, "dllm_requests_finished_total")
    with way(triton):
        pass
    eventually(
        lambda: metric(triton, "dllm_requests_cancelled_total") == cancelled + 1,
        "the request is cancelled",
    )
    assert metric(triton, "dllm_requests_finished_total") == finished
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "its place is free")
