"""The engine's process dies under callers who speak to Triton directly."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from tests.e2e.triton_calls import LONG, generate, post
from tests.support.repositories import changed_repository, hang
from tests.support.servers import eventually, has_ended, metric, stub_of, triton_server

CALLS = 4
#: Runs for long enough to be seen in the metrics, which are published once a second.
LONGER = LONG | {"cfg_scale": 1.0}


def regions() -> set[str]:
    """Shared memory of servers that this process has started."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"dllm_{os.getpid()}_")}


@pytest.mark.parametrize("instances", [1, 2])
def test_killed_engine_ends_its_server(checkpoint: Path, tmp_path: Path, instances: int) -> None:
    """When an engine's process is killed, streams and calls break within 2 s; nothing is left."""
    repository = changed_repository(tmp_path, instances=instances)
    log_file = tmp_path / "triton.log"
    settings = {"OMP_NUM_THREADS": "1"}
    before = regions()
    with (
        triton_server(
            checkpoint, repository=repository, log_file=log_file, settings=settings
        ) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        family = psutil.Process(server.pid).children(recursive=True)
        url = f"http://{server.http_url}/v2/models"
        stream = requests.post(
            f"{url}/dllm/generate_stream", json=LONGER | {"stream": True}, stream=True, timeout=60
        )
        unary = pool.submit(requests.post, f"{url}/dllm_unary/generate", json=LONGER, timeout=60)
        lines = stream.iter_lines()
        assert next(lines)
        stub_of(server, "dllm", instances - 1).kill()
        killed = time.monotonic()
        with pytest.raises(requests.RequestException):
            for _ in lines:
                pass
        with pytest.raises(requests.RequestException):
            unary.result(timeout=60)
        assert time.monotonic() - killed < 2
        eventually(lambda: not server.running, "the server has ended", seconds=10)
        eventually(lambda: all(map(has_ended, family)), "its processes have ended", seconds=10)
        assert regions() == before
    assert "killing tritonserver" in log_file.read_text()


def test_server_outlives_its_engine_where_that_is_wanted(checkpoint: Path) -> None:
    """With DLLM_EXIT_ON_ENGINE_DEATH=off a server that other models share goes on."""
    settings = {"DLLM_EXIT_ON_ENGINE_DEATH": "off"}
    with triton_server(checkpoint, settings=settings) as server:
        stub_of(server, "dllm").kill()
        answer = post(server, {"text_input": "hello", "gen_length": 8})
        assert "not healthy" in answer.json()["error"]
        time.sleep(2)
        assert server.running


def test_stopped_server_is_not_killed(checkpoint: Path, tmp_path: Path) -> None:
    """An orderly stop ends the watcher of the engine; it kills nothing."""
    log_file = tmp_path / "triton.log"
    with triton_server(checkpoint, log_file=log_file) as server:
        assert generate(server, text_input="hello", gen_length=8).text
    assert "killing tritonserver" not in log_file.read_text()


def test_a_dying_engine_refuses_who_comes(checkpoint: Path, tmp_path: Path) -> None:
    """Requests in a dying engine get the reason; later ones learn that they were not run."""
    repository = changed_repository(tmp_path, can_hang=True)
    settings = {"DLLM_STEP_TIMEOUT": "6"}
    with (
        triton_server(checkpoint, repository=repository, settings=settings) as server,
        ThreadPoolExecutor(CALLS) as pool,
    ):

        def ask_twice(model: str) -> tuple[requests.Response, requests.Response]:
            return post(server, LONGER, model=model), post(server, LONGER, model=model)

        calls = [pool.submit(ask_twice, model) for model in ["dllm", "dllm_unary"] * (CALLS // 2)]
        eventually(lambda: metric(server, "dllm_running_requests") == CALLS, "all run")
        hang(tmp_path, stub_of(server, "dllm").pid)
        why = "a step has not ended within 6 s (DLLM_STEP_TIMEOUT)"
        for call in calls:
            lost, refused = call.result(timeout=60)
            assert why in lost.json()["error"]
            assert "takes no more" not in lost.json()["error"]
            assert f"the engine takes no more requests: {why}" in refused.json()["error"]
        eventually(lambda: not server.running, "the server has ended", seconds=10)
