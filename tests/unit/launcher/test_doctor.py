"""What `dllm doctor` finds."""

import json
import os
import socket
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from launcher import doctor
from launcher.doctor import Finding, State
from launcher.ports import free_port
from launcher.program import app
from launcher.settings import Settings


def test_the_report_covers_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line a finding, or JSON; a service that was asked for and is away makes the exit code 1."""
    away = f"http://127.0.0.1:{free_port()}"
    for name in ("PORT", "TRITON_HTTP_PORT", "TRITON_GRPC_PORT", "TRITON_METRICS_PORT"):
        monkeypatch.setenv(f"DLLM_{name}", str(free_port()))
    outcome = CliRunner().invoke(app, ["doctor", "--json", "--url", away])
    found = {one["check"]: one for one in json.loads(outcome.stdout)}
    assert {"torch", "tritonserver", "proxies", "shared memory", "machine", "gpu"} <= set(found)
    assert found["service"]["state"] == "fail"
    assert outcome.exit_code == 1
    plain = CliRunner().invoke(app, ["doctor"])
    assert "WARN  service " in plain.stdout
    assert "start it with: dllm serve" in plain.stdout


def test_a_taken_port_is_found() -> None:
    """With the setting that moves it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (first, *_) = doctor.ports(Settings(port=port))
    assert (first.check, first.state) == (f"port {port}", State.WARN)
    assert "DLLM_PORT" in first.message


def test_proxies_and_misspelt_settings_are_found() -> None:
    """Both are warnings that name the variable."""
    env = {"HTTP_PROXY": "http://proxy:1", "NO_PROXY": "a,b", "DLLM_CAHCE": "dual"}
    setting, proxy = doctor.variables(env)
    assert setting.state is proxy.state is State.WARN
    assert "did you mean DLLM_CACHE?" in setting.message
    assert "HTTP_PROXY set; hosts that bypass it: a,b" in proxy.message
    assert [one.state for one in doctor.variables({})] == [State.OK]


def test_regions_of_dead_servers_are_found(tmp_path: Path) -> None:
    """A region is stale if the process whose id it has is not there."""
    (tmp_path / f"dllm_{os.getpid()}_ab_1").touch()
    room, *stale = doctor.shared_memory(tmp_path)
    assert (room.state, stale) == (State.OK, [])
    (tmp_path / "dllm_4194305_ab_1").touch()  # above Linux's largest process id
    _, stale_one = doctor.shared_memory(tmp_path)
    assert stale_one.state is State.WARN
    assert f"rm {tmp_path}/dllm_4194305_ab*" in stale_one.message
    (missing,) = doctor.shared_memory(tmp_path / "none")
    assert missing.state is State.FAIL


def test_gpus_and_their_clocks_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with a PyTorch that cannot use it is a failure."""
    line = "NVIDIA H200, 143771, 512, 570.1, 345, 1980"
    monkeypatch.setattr("launcher.doctor.metadata.version", lambda _: "2.13.0+cpu")
    gpu, torch = doctor.gpus(lambda: line)
    message = "NVIDIA H200, 512 of 143771 MiB used, driver 570.1, 345 of 1980 MHz"
    assert gpu == Finding("gpu", State.OK, message)
    assert torch.state is State.FAIL
    (none,) = doctor.gpus(lambda: None)
    assert none.state is State.OK
    broken, _ = doctor.gpus(lambda: "NVIDIA-SMI has failed")
    assert broken.state is State.FAIL


@pytest.mark.parametrize(("ahead", "state"), [(0, State.OK), (3600, State.WARN)])
def test_a_clock_that_is_wrong_is_found(ahead: int, state: State) -> None:
    """The service's Date is compared with this machine's clock."""

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"status": "ok"}'
            self.send_response_only(200)
            self.send_header("Date", formatdate(doctor.time.time() + ahead, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        health, clock = doctor.service(url, None, expected=True)
        server.shutdown()
    assert (health.state, clock.state) == (State.OK, state)
