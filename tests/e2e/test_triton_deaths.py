"""The engine's process dies under callers who speak to Triton directly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from tests.e2e.triton_calls import LONG, generate, post, tensors
from tests.support.repositories import changed_repository, hang
from tests.support.servers import eventually, metric, stub_of, triton_server

CALLS = 4
#: Runs for long enough to be seen in the metrics, which are published once a second.
LONGER = LONG | {"cfg_scale": 1.0}


def test_unary_calls_of_a_lost_engine_are_answered(checkpoint: Path) -> None:
    """Triton never answers whom a killed engine had; `dllm_unary` does once there is another."""
    with triton_server(checkpoint) as server, ThreadPoolExecutor(CALLS) as pool:

        def infer() -> None:
            with triton_http.InferenceServerClient(server.http_url, network_timeout=120) as client:
                client.infer("dllm_unary", tensors(server, triton_http, LONGER))

        calls = [pool.submit(infer) for _ in range(CALLS)]
        eventually(lambda: metric(server, "dllm_running_requests") == CALLS, "all run")
        stub_of(server, "dllm").kill()
        for what in ("unload", "load"):
            url = f"http://{server.http_url}/v2/repository/models/dllm/{what}"
            assert requests.post(url, json={}, timeout=120).status_code == 200
        for call in calls:
            with pytest.raises(InferenceServerException, match="the engine was lost") as error:
                call.result(timeout=60)
            assert error.value.status() == "503"
        assert generate(server, model="dllm_unary", text_input="hello", gen_length=8).text


def test_a_dying_engine_refuses_who_comes(checkpoint: Path, tmp_path: Path) -> None:
    """Who is with it is told why it dies. Who comes then is told that his request was not run,
    which the adapter takes to mean that it may be run elsewhere as if it were new."""
    repository = changed_repository(tmp_path, can_hang=True)
    settings = {"DLLM_STEP_TIMEOUT": "2"}
    with (
        triton_server(checkpoint, repository=repository, settings=settings) as server,
        ThreadPoolExecutor(CALLS) as pool,
    ):

        def ask_twice(model: str) -> tuple[requests.Response, requests.Response]:
            return post(server, LONGER, model=model), post(server, LONGER, model=model)

        calls = [pool.submit(ask_twice, model) for model in ["dllm", "dllm_unary"] * (CALLS // 2)]
        eventually(lambda: metric(server, "dllm_running_requests") == CALLS, "all run")
        hang(tmp_path, stub_of(server, "dllm").pid)
        why = "a step has not ended within 2 s (DLLM_STEP_TIMEOUT)"
        for call in calls:
            lost, refused = call.result(timeout=60)
            assert why in lost.json()["error"]
            assert "takes no more" not in lost.json()["error"]
            assert f"the engine takes no more requests: {why}" in refused.json()["error"]
