"""The `dllm-serve` command: messages, and the demonstration against a scripted API."""

import io
import json
import socket
from pathlib import Path

import httpx
import pytest
from dllm_client import Client
from rich.console import Console
from typer.testing import CliRunner

from launcher import demo
from launcher.cli import app
from launcher.console import ConsoleReporter, Logs
from launcher.errors import ServerMissingError
from launcher.ports import free_port
from launcher.settings import Settings
from launcher.tritonserver import TritonServer


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """DLLM_ variables set the fields; an empty one counts as unset; 0.0.0.0 is reached locally."""
    monkeypatch.setenv("DLLM_HOST", "0.0.0.0")
    monkeypatch.setenv("DLLM_PORT", "8080")
    monkeypatch.setenv("DLLM_WORKERS", "")
    settings = Settings()
    assert (settings.url, settings.workers) == ("http://127.0.0.1:8080", 1)
    assert (settings.model_repository / "dllm" / "config.pbtxt").is_file()


def test_bad_setting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad value is reported with its variable and itself, without a traceback."""
    monkeypatch.setenv("DLLM_TRITON_GRPC_PORT", "99999")
    outcome = CliRunner().invoke(app, ["serve"])
    assert outcome.exit_code == 1
    expected = "DLLM_TRITON_GRPC_PORT='99999': Input should be less than or equal to 65535\n"
    assert outcome.stderr == expected


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DLLM_PORT", "8010", "DLLM_TRITON_HTTP_PORT=8010: should differ from DLLM_PORT"),
        ("DLLM_HOST", "192.0.2.1", "port 8000 on 192.0.2.1 cannot be used: Cannot assign"),
        ("DLLM_START_TIMEOUT", "inf", "DLLM_START_TIMEOUT='inf': Input should be a finite number"),
    ],
)
def test_a_place_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    """An address of another machine, or one port for two, is told before anything starts."""
    monkeypatch.setenv(name, value)
    outcome = CliRunner().invoke(app, ["serve"])
    assert outcome.exit_code == 1
    (line,) = outcome.output.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MODEL_PATH", "GSAI-ML/LLaDA-8B-Instruct", "hf download GSAI-ML/LLaDA-8B-Instruct"),
        ("DLLM_MAX_LIVE", "abc", "DLLM_MAX_LIVE='abc': Input should be a valid integer"),
        ("DLLM_API_KEYS", "me", "DLLM_API_KEYS: entry 1 must be name:hash"),
    ],
)
def test_settings_of_all_parts_are_looked_at_first(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    """What engine or adapter would refuse is one line, before either starts."""
    monkeypatch.setattr(TritonServer, "spawn", lambda _: pytest.fail("Triton was started"))
    monkeypatch.setenv(name, value)
    outcome = CliRunner().invoke(app, ["serve", "--port", str(free_port())])
    assert outcome.exit_code == 1
    assert said in outcome.output
    assert len(outcome.output.splitlines()) == 1


def test_serve_takes_the_checkpoint_as_an_argument(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The directory behind `serve` wins over MODEL_PATH, and is checked before anything starts."""
    served = []

    def start(settings: Settings, reporter: ConsoleReporter, env: dict[str, str]) -> None:
        del settings, reporter
        served.append(env["MODEL_PATH"])
        raise ServerMissingError("enough")

    monkeypatch.setattr("launcher.cli.Stack", start)
    monkeypatch.setenv("MODEL_PATH", str(tmp_path))
    checkpoint = Settings().model_repository / "dllm/1/demo_checkpoint"
    port = ["--port", str(free_port())]
    outcome = CliRunner().invoke(app, ["serve", str(checkpoint), *port])
    assert (outcome.exit_code, served) == (1, [str(checkpoint)])
    outcome = CliRunner().invoke(app, ["serve", str(tmp_path / "nowhere"), *port])
    assert outcome.stderr == f"dllm: {tmp_path}/nowhere: no such directory\n"


def test_a_misspelt_setting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lines name the variable that is ignored, and the one that was meant."""
    monkeypatch.setattr(TritonServer, "start", lambda _: None)
    monkeypatch.setattr(TritonServer, "wait", lambda _: None)
    monkeypatch.setenv("DLLM_CAHCE", "dual")
    outcome = CliRunner().invoke(app, ["triton"])
    first = outcome.output.splitlines()[0]
    assert first == (
        "warning: DLLM_CAHCE is not a setting and is ignored; did you mean DLLM_CACHE?"
    )


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_taken_port_is_one_line(command: str) -> None:
    """A port in use ends the command with the message that names the setting."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        outcome = CliRunner().invoke(app, [command, "--port", str(other.getsockname()[1])])
    assert outcome.exit_code == 1
    assert "another port with DLLM_PORT" in outcome.stderr


def test_missing_repository_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A repository without the models ends the command with where it looked."""
    monkeypatch.setenv("DLLM_MODEL_REPOSITORY", str(tmp_path))
    outcome = CliRunner().invoke(app, ["serve", "--port", str(free_port())])
    assert outcome.exit_code == 1
    assert f"model repository {tmp_path} has no model 'dllm'" in outcome.stderr


class Api:
    """Finishes each job at its second poll, but those whose prompt it was told to fail."""

    def __init__(self, failing: str = "") -> None:
        self.bodies: list[dict[str, object]] = []
        self._failing = failing
        self._prompts: list[str] = []
        self._polled: set[int] = set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            body = json.loads(request.content)
            self.bodies.append(body)
            prompts = body.get("prompts") or [body["prompt"]]
            first = len(self._prompts)
            self._prompts += prompts
            ids = list(range(first, len(self._prompts)))
            return httpx.Response(200, json={"request_ids": ids, "status": "submitted"})
        request_id = int(request.url.path.rpartition("/")[2])
        status, text, error = "running", None, None
        if request_id in self._polled:
            failed = self._prompts[request_id] == self._failing
            status, text, error = (
                ("failed", None, "bad luck") if failed else ("finished", "ok", None)
            )
        self._polled.add(request_id)
        fields = {"request_id": request_id, "status": status, "text": text, "error": error}
        return httpx.Response(200, json=fields)


def run_demo(api: Api) -> tuple[bool, str]:
    output = io.StringIO()
    with Client("http://server", transport=httpx.MockTransport(api)) as client:
        finished = demo.run(client, Console(file=output, width=100))
    return finished, output.getvalue()


def test_demo_sends_the_requests_of_the_guide() -> None:
    """The first two calls are the guide's own, and every prompt is shown with its text."""
    api = Api()
    finished, output = run_demo(api)
    assert finished
    assert api.bodies[:2] == [
        {"prompt": "Tell me about AI", "temperature": 0.6, "gen_length": 128},
        {"prompts": ["What is AI?", "Explain ML."], "temperature": 0.0, "gen_length": 64},
    ]
    for prompt in ("Tell me about AI", "Explain ML.", *demo.QUESTIONS):
        assert prompt in output
    assert "6 of 6 jobs finished" in output


def test_demo_reports_a_failed_job() -> None:
    """One failed job makes the demonstration fail, and its reason is shown."""
    finished, output = run_demo(Api(failing="What is AI?"))
    assert not finished
    assert "failed: bad luck" in output
    assert "5 of 6 jobs finished" in output


@pytest.mark.parametrize(("logs", "shown"), [(Logs.NONE, ""), (Logs.READY, "b"), (Logs.ALL, "abc")])
def test_reporter_without_a_terminal(logs: Logs, shown: str) -> None:
    """In a log file progress is a line every few seconds; logs of loading parts can be left out."""
    output = io.StringIO()
    with ConsoleReporter(Console(file=output), logs) as reporter:
        for tenth in range(100):
            line = 'I1122 20:21:13.569255 3712 model_lifecycle.cc:472] "[layer] loading"'
            reporter.waiting("triton", tenth / 10, line)
        reporter.log("triton", "a")
        reporter.ready("triton", 10.0)
        reporter.log("triton", "b")
        reporter.trouble("oh [no]")
        reporter.waiting("triton", 0.0, "")
        reporter.log("triton", "c")
    lines = output.getvalue().splitlines()
    assert [line for line in lines if not line.startswith("triton |")] == [
        'triton: starting, 0 s  "[layer] loading"',
        'triton: starting, 5 s  "[layer] loading"',
        "triton: ready after 10.0 s",
        "oh [no]",
        "triton: starting, 0 s  ",
    ]
    assert "".join(line[-1] for line in lines if line.startswith("triton |")) == shown
