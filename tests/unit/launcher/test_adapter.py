"""The adapter as a child process."""

import os
from pathlib import Path

import pytest

import launcher.adapter
from launcher.adapter import Adapter
from launcher.ports import free_port
from launcher.settings import Settings

SLOW_TO_STOP = """
import asyncio
import contextlib
from pathlib import Path

import fastapi


@contextlib.asynccontextmanager
async def lifespan(app):
    yield
    await asyncio.sleep(1.5)
    Path("drained").touch()


app = fastapi.FastAPI(lifespan=lifespan)
app.get("/v1/health")(lambda: "ok")
"""


@pytest.mark.parametrize(("drain", "drained"), [("30", True), ("0", False)])
def test_stop_leaves_running_jobs_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: str, drained: bool
) -> None:
    """Whatever `DLLM_DRAIN_SECONDS` grants the jobs, the launcher grants the adapter."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/app.py").write_text(SLOW_TO_STOP)
    monkeypatch.chdir(tmp_path)  # where `python -m` looks first
    monkeypatch.setattr(launcher.adapter, "CONNECTION_SECONDS", 0)
    monkeypatch.setattr(launcher.adapter, "EXIT_SECONDS", 0.5)
    monkeypatch.setenv("DLLM_DRAIN_SECONDS", drain)
    adapter = Adapter(Settings(port=free_port()), env=dict(os.environ))
    adapter.start()
    adapter.stop()
    assert (tmp_path / "drained").exists() == drained
