"""Settings come from the environment, and nonsense is refused by name."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapter.errors import SettingsError
from adapter.rates import Rate
from adapter.settings import load_settings

ADAPTER = Path(__file__).parents[3] / "adapter"


def test_environment_overrides_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable sets its field; one that is empty sets nothing."""
    monkeypatch.setenv("DLLM_MAX_GEN_LENGTH", "77")
    monkeypatch.setenv("DLLM_MAX_BATCH_SIZE", "")
    settings = load_settings()

    assert (settings.max_gen_length, settings.max_batch_size) == (77, 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DLLM_MAX_QUEUED_JOBS", "many"),
        ("DLLM_MAX_GEN_LENGTH", "0"),
        ("DLLM_MAX_TEMPERATURE", "nan"),
        ("DLLM_METRICS_NEED_KEY", "perhaps"),
        ("DLLM_LOG_LEVEL", "loud"),
        ("DLLM_LOG_FORMAT", "xml"),
        ("DLLM_TRITON_URL", "triton:99999"),
        ("DLLM_CORS_ORIGINS", "chat.example.org"),
    ],
)
def test_bad_value_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """A value that does not parse stops the start, naming variable and value."""
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError, match=f"{name}='{value}'"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DLLM_MAX_LIVE", "abc", "DLLM_MAX_LIVE='abc': Input should be a valid integer"),
        ("DLLM_TRITON_URL", "x", "DLLM_TRITON_URL='x': 'x' should be host:port"),
        ("DLLM_API_KEYS_FILE", "/nowhere", "DLLM_API_KEYS_FILE: "),
        ("DLLM_DATABASE_URL", "sqlite:////nowhere/jobs.db", "does not exist: /nowhere"),
        ("DLLM_DATABASE_URL", "postgresql+asyncpg://a:hush@b:c/d", "the port should be a number"),
        ("DLLM_ENGINE_IDLE_TIMEOUT", "1", "DLLM_ENGINE_IDLE_TIMEOUT=1: should be at least twice"),
        ("PROMETHEUS_MULTIPROC_DIR", "/nowhere", "PROMETHEUS_MULTIPROC_DIR=/nowhere: should be"),
    ],
)
def test_a_bad_value_is_one_line_for_uvicorn(name: str, value: str, said: str) -> None:
    """The served application ends with one line, and with the status that ends a supervisor."""
    run = subprocess.run(
        [sys.executable, "-c", "import adapter.app"],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 3
    (line,) = run.stderr.splitlines()
    assert line.startswith("the adapter cannot start: ")
    assert said in line
    assert "hush" not in line


def test_the_check_reports_without_starting() -> None:
    """`python -m adapter.check` says what a start would say, and warns of misspelt names."""
    run = subprocess.run(
        [sys.executable, "-m", "adapter.check"],
        env={**os.environ, "DLLM_API_KEYS": "x", "DLLM_MAX_LIFE": "3", "DLLM_CACHE": "dual"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    warning, error = run.stderr.splitlines()
    assert warning.endswith(
        "DLLM_MAX_LIFE is not a setting and is ignored; did you mean DLLM_MAX_LIVE?"
    )
    assert error.startswith("DLLM_API_KEYS: entry 1 must be name:hash")


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [
        ("0.0.0.0", "", True),
        ("::", "", True),
        ("127.0.0.1", "", False),
        ("localhost", "", False),
        ("0.0.0.0", f"me:{64 * '0'}", False),
    ],
)
def test_an_open_service_is_told(host: str, keys: str, warned: bool) -> None:
    """Other machines may call without a key only under a loud warning."""
    run = subprocess.run(
        [sys.executable, "-m", "adapter.check"],
        env={**os.environ, "DLLM_HOST": host, "DLLM_API_KEYS": keys},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    assert ("warning: everyone who reaches" in run.stderr) == warned


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "postgresql://me:hush@db/dllm",
        "mysql+aiomysql://me:hush@db/dllm",
    ],
)
def test_database_that_cannot_serve_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """Only databases that last and are known are taken; the password is not shown."""
    monkeypatch.setenv("DLLM_DATABASE_URL", url)

    with pytest.raises(SettingsError, match="DLLM_DATABASE_URL: should be") as caught:
        load_settings()
    assert "hush" not in str(caught.value)


def test_silence_must_outlast_the_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound shorter than the rhythm of events would find every engine dead."""
    monkeypatch.setenv("DLLM_ENGINE_IDLE_TIMEOUT", "1.5")

    with pytest.raises(
        SettingsError,
        match="DLLM_ENGINE_IDLE_TIMEOUT=1.5: should be at least twice DLLM_STREAM_INTERVAL",
    ):
        load_settings()


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("60/minute", [("60 per 1 minute", 60)]),
        ("5/second; 60 per 2 Hours", [("5 per 1 second", 1), ("60 per 2 hour", 7200)]),
        ("7 / 3days,1/year", [("7 per 3 day", 3 * 86_400), ("1 per 1 year", 365 * 86_400)]),
    ],
)
def test_rates_are_read(text: str, rates: list[tuple[str, int]]) -> None:
    """A rate is a number of calls in a window of one or several units; there may be several."""
    assert [(str(rate), rate.seconds) for rate in Rate.parse_all(text)] == rates


@pytest.mark.parametrize("text", ["60", "minute", "a/minute", "1/fortnight", "1/minute;", "-1/day"])
def test_a_rate_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error shows how a rate is written."""
    monkeypatch.setenv("DLLM_RATE_LIMIT", text)

    with pytest.raises(SettingsError, match="DLLM_RATE_LIMIT=.* should be like 60/minute"):
        load_settings()


def test_adapter_never_imports_the_engine() -> None:
    """No module of the adapter names the engine, torch, or the client."""
    forbidden = {"dllm_engine", "dllm_client", "torch", "transformers", "launcher"}
    for path in ADAPTER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not forbidden & {name.split(".")[0] for name in names}, path


def test_import_opens_nothing(tmp_path: Path) -> None:
    """Importing the application makes no file and loads no engine."""
    code = "import sys, adapter.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)

    assert list(tmp_path.iterdir()) == []
