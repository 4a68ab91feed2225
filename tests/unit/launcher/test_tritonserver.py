"""The real tritonserver, with models of a few lines on free ports."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launcher.errors import PortTakenError, ProcessDiedError, RepositoryError, StartTimeoutError
from launcher.tritonserver import TritonServer


def server(repository: Path, model: str, **options: object) -> TritonServer:
    """A server with one model of the repository; by default it loads all of them."""
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    one = ("--model-control-mode=explicit", f"--load-model={model}")
    return TritonServer(repository, models=[model], extra_args=one, **(ports | options))  # type: ignore[arg-type]


def infer(url: str, values: list[float]) -> list[float]:
    tensor = {"name": "IN", "shape": [len(values)], "datatype": "FP32", "data": values}
    body = json.dumps({"inputs": [tensor]}).encode()
    with urllib.request.urlopen(f"http://{url}/v2/models/echo/infer", body, timeout=10) as answer:
        data: list[float] = json.load(answer)["outputs"][0]["data"]
        return data


def regions(owner: int) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"dllm_{owner}_")]


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def test_serves_and_leaves_nothing_behind(repository: Path, tmp_path: Path) -> None:
    """A started server answers; a stopped one leaves no process, shared memory or open port."""
    lines: list[str] = []
    waits: list[float] = []
    log_file = tmp_path / "triton.log"
    echo = server(
        repository,
        "echo",
        env={"ECHO_NOTE": "as told"},
        on_log=lines.append,
        on_wait=lambda seconds, _: waits.append(seconds),
        log_file=log_file,
    )
    with echo:
        assert infer(echo.http_url, [1.0, 2.5]) == [1.0, 2.5]
        with urllib.request.urlopen(echo.metrics_url, timeout=10) as page:
            assert b"nv_inference_request_success" in page.read()
        assert psutil.Process(echo.pid).name() == "tritonserver"
        family = [psutil.Process(echo.pid), *psutil.Process(echo.pid).children(recursive=True)]
        assert len(family) > 1
        assert regions(os.getpid())

    assert not echo.running
    assert not [process for process in family if process.is_running()]
    assert not regions(os.getpid())
    assert f"echo runs in {sys.prefix} as told" in lines
    assert lines == log_file.read_text().splitlines()
    assert waits == sorted(waits)
    with pytest.raises(OSError, match="refused"):
        infer(echo.http_url, [1.0])


def test_failed_load_shows_the_log(repository: Path) -> None:
    """A model that cannot load ends the start with an error that holds the model's own words."""
    with (
        pytest.raises(ProcessDiedError, match="no tensor 'wte'") as caught,
        server(repository, "broken"),
    ):
        pass
    assert any("wte" in line for line in caught.value.log_tail)
    assert not regions(os.getpid())


def test_start_timeout(repository: Path) -> None:
    """A server that is not ready in time is ended, and the error says how long it was given."""
    slow = server(repository, "echo", start_timeout=0.1)
    with pytest.raises(StartTimeoutError, match=r"not ready after 0 s"), slow:
        pass
    assert not slow.running
    assert not regions(os.getpid())


def test_taken_port_is_named(repository: Path) -> None:
    """A port in use is found before the start; the message names it and the setting for it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(PortTakenError, match=rf"gRPC port {port} .*DLLM_TRITON_GRPC_PORT"),
            server(repository, "echo", grpc_port=port),
        ):
            pass


def test_unknown_model_is_named(repository: Path) -> None:
    """A model that the repository lacks is an error before the start."""
    with pytest.raises(RepositoryError, match="no model 'dllm'"), server(repository, "dllm"):
        pass


def test_a_repository_below_a_folder_that_is_not_ascii(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models load, though Triton's stub takes paths for ASCII; the links to it go with it."""
    below = tmp_path / "josé"
    below.mkdir()
    repository.rename(below / "models")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with server(below / "models", "echo") as echo:
        assert list(scratch.iterdir())
        assert infer(echo.http_url, [1.0]) == [1.0]
    assert not list(scratch.iterdir())


LAUNCHER = """
import sys, time
from launcher.tritonserver import TritonServer
with TritonServer(sys.argv[1], models=["stubborn"], http_port=0, grpc_port=0, metrics_port=0,
                  extra_args=["--model-control-mode=explicit", "--load-model=stubborn"],
                  exit_timeout=1) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


def test_killed_launcher_takes_its_server_along(repository: Path) -> None:
    """kill -9 of the launcher ends the server and a stub that ignores SIGTERM, with its memory."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(repository)], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    triton = psutil.Process(int(launcher.stdout.readline()))
    family = [triton, *triton.children(recursive=True)]
    assert len(family) > 1
    assert regions(launcher.pid)

    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()

    assert eventually(lambda: not any(process.is_running() for process in family))
    assert eventually(lambda: not regions(launcher.pid))
