"""The adapter as a child process."""

import os
from pathlib import Path

import httpx
import pytest

import launcher.adapter
from launcher.adapter import Adapter
from launcher.ports import free_port
from launcher.settings import Settings

SHOW_METRICS_FOLDER = """
import os

import fastapi

app = fastapi.FastAPI()
app.get("/v1/health")(lambda: "ok")
folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
found = os.listdir(folder)
open(os.path.join(folder, "counter_1.db"), "w").close()
app.get("/folder")(lambda: [folder, *found])
"""

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


def test_each_start_has_an_empty_folder_for_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter finds an empty `PROMETHEUS_MULTIPROC_DIR` at each start; a stop removes it."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/app.py").write_text(SHOW_METRICS_FOLDER)
    monkeypatch.chdir(tmp_path)
    adapter = Adapter(settings := Settings(port=free_port()), env=dict(os.environ))
    folders = set()
    for _ in range(2):
        adapter.start()
        folder, *found = httpx.get(f"{settings.url}/folder").json()
        assert found == []
        adapter.stop()
        assert not Path(folder).exists()
        folders.add(folder)
    assert len(folders) == 2
