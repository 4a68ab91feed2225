"""What operators do to a running service: upgrade, go back, back up, restore."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
from io import BytesIO
from pathlib import Path

import pytest
import requests
from sqlalchemy import make_url

from launcher.tritonserver import TritonServer
from tests.support.postgres import PostgresServer, programs_folder
from tests.support.servers import CHECKOUT, AdapterServer, eventually, triton_server

pytestmark = pytest.mark.slow
#: There is no release yet: the last commit with schema 0006.
RELEASE_BEFORE = "73f9609"
FAST = {"DLLM_LEASE_SECONDS": "3", "DLLM_DRAIN_SECONDS": "1"}


def git(*arguments: str) -> bytes:
    """What git prints; skips the test where there is no history."""
    run = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True)
    if run.returncode or not run.stdout:
        pytest.skip("this checkout has no history to take the release before from")
    return run.stdout


@pytest.fixture(scope="module")
def release_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapter and the engine of the release before."""
    archive = git("archive", RELEASE_BEFORE, "adapter", "model_repository")
    folder = tmp_path_factory.mktemp("release-before")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


class OldAdapter(AdapterServer):
    """The adapter of the release before."""

    folder: Path

    def start(self) -> None:
        """Start it in its folder, from where `python -m` takes its code."""
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            super().start()
        finally:
            os.chdir(here)


def migrate(url: str, *revision: str) -> str:
    """`python -m adapter.migrate`."""
    run = subprocess.run(
        [sys.executable, "-m", "adapter.migrate", *revision],
        env={**os.environ, "DLLM_DATABASE_URL": url},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_an_upgrade_and_a_rollback_lose_no_job(
    release_before: Path,
    checkpoint: Path,
    triton: TritonServer,
    postgres: PostgresServer,
    tmp_path: Path,
) -> None:
    """Old and new adapters, each with its engine, share a database under load; going back works."""
    repository = release_before / "model_repository"
    # Before the engine of this checkout, which is installed where the tests run.
    path = {"PYTHONPATH": str(repository / "dllm/1")}
    with triton_server(checkpoint, repository=repository, settings=path) as before:
        upgrade_and_go_back(release_before, before, triton, postgres, tmp_path)


def upgrade_and_go_back(
    release_before: Path,
    triton_before: TritonServer,
    triton: TritonServer,
    postgres: PostgresServer,
    tmp_path: Path,
) -> None:
    """The steps of docs/operate.md."""
    url = postgres.fresh_database()
    settings = {"DLLM_DATABASE_URL": url, **FAST}
    old = OldAdapter(triton_before, tmp_path / "old.db", settings=settings)
    old.folder = release_before
    new = AdapterServer(triton, tmp_path / "new.db", settings=settings)
    jobs: list[int] = []
    over = threading.Event()

    def submit(adapters: list[AdapterServer]) -> None:
        while not over.is_set():
            for adapter in adapters:
                try:
                    jobs.append(adapter.submit(f"job {len(jobs)}", gen_length=16))
                except requests.ConnectionError:
                    assert adapter is old  # it has been stopped
            over.wait(0.05)

    with old:
        assert old.finished(old.submit("before", gen_length=8))
        load = threading.Thread(target=submit, args=([old],))
        load.start()
        before, _, after = migrate(url).removeprefix("schema ").partition(" -> ")
        assert before < after
        with new:
            both = threading.Thread(target=submit, args=([new],))
            both.start()
            eventually(lambda: len(jobs) > 30, "both take jobs")
            old.stop()
            over.set()
            load.join()
            both.join()
            assert jobs
            for job in jobs:
                assert new.finished(job)
            waiting = new.submit_batch(["a", "b"] * 4, gen_length=128)
        assert migrate(url, before) == f"schema {after} -> {before}"
        old.start()
        for job in waiting:
            assert old.finished(job)
        assert old.finished(jobs[0])


def backup_sqlite(database: Path, target: Path) -> None:
    """The command of docs/operate.md."""
    with sqlite3.connect(database) as connection:
        connection.execute("VACUUM INTO ?", (str(target),))


def test_a_backup_of_sqlite_is_restored(triton: TritonServer, tmp_path: Path) -> None:
    """Made while jobs run; results are there again, and what had not ended runs."""
    with AdapterServer(triton, tmp_path / "jobs.db", settings=FAST) as adapter:
        done = adapter.submit("done", gen_length=8)
        text = adapter.finished(done)
        running = adapter.submit_batch(["a", "b"] * 2, gen_length=128, ignore_eos=True)
        backup_sqlite(tmp_path / "jobs.db", tmp_path / "backup.db")
    (tmp_path / "restored").mkdir()
    shutil.copy(tmp_path / "backup.db", tmp_path / "restored/jobs.db")
    with AdapterServer(triton, tmp_path / "restored/jobs.db", settings=FAST) as adapter:
        assert adapter.result(done)["text"] == text
        for job in running:
            assert adapter.finished(job)


def test_a_backup_of_postgresql_is_restored(
    triton: TritonServer, postgres: PostgresServer, tmp_path: Path
) -> None:
    """pg_dump while jobs run, pg_restore into an empty database: results stay, the rest runs."""
    programs = programs_folder()
    source, target = (make_url(postgres.fresh_database()) for _ in range(2))

    server = ["-h", source.host, "-p", str(source.port), "-U", "postgres"]

    def tool(name: str, *arguments: str) -> None:
        run = subprocess.run(
            [programs / name, *server, *arguments],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr

    settings = {"DLLM_DATABASE_URL": source.render_as_string(hide_password=False), **FAST}
    with AdapterServer(triton, tmp_path / "one.db", settings=settings) as adapter:
        done = adapter.submit("done", gen_length=8)
        text = adapter.finished(done)
        running = adapter.submit_batch(["a", "b"] * 2, gen_length=128, ignore_eos=True)
        tool("pg_dump", "-Fc", "-f", str(tmp_path / "backup"), str(source.database))
    tool("pg_restore", "-d", str(target.database), str(tmp_path / "backup"))
    settings["DLLM_DATABASE_URL"] = target.render_as_string(hide_password=False)
    with AdapterServer(triton, tmp_path / "two.db", settings=settings) as adapter:
        assert adapter.result(done)["text"] == text
        for job in running:
            assert adapter.finished(job)
        assert adapter.submit("next", gen_length=8) > max(running)
