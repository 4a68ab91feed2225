"""Run the REST adapter as a child process."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import httpx

from launcher.errors import SettingError, StartTimeoutError
from launcher.ports import require_free_port
from launcher.process import GuardedProcess, LogCallback
from launcher.settings import Settings
from launcher.tritonserver import POLL_SECONDS, WaitCallback

#: Open connections (a poll held by `?wait=`, a stream) are cut after this many seconds.
CONNECTION_SECONDS = 5
#: Time to exit after its connections are cut and its jobs have drained.
EXIT_SECONDS = 5.0
#: Longer than proxies keep an idle connection (nginx: 60 s). If the server closed first, a call
#: already under way would sometimes meet a closed connection, and the proxy would answer 502.
KEEP_ALIVE_SECONDS = 75


class Adapter:
    """uvicorn with the adapter's application, connected to the Triton of the same settings."""

    def __init__(
        self,
        settings: Settings,
        *,
        env: Mapping[str, str],
        on_log: LogCallback | None = None,
        on_wait: WaitCallback | None = None,
    ) -> None:
        self._settings = settings
        self._env = dict(env)
        self._on_log = on_log
        self._on_wait = on_wait
        self._process: GuardedProcess | None = None
        self._metrics: tempfile.TemporaryDirectory[str] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    @property
    def log_tail(self) -> list[str]:
        return self._process.tail() if self._process is not None else []

    def check(self) -> list[str]:
        """Have the adapter look at its settings; returns its warnings. Raises SettingError."""
        command = [sys.executable, "-m", "adapter.check"]
        found = subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, errors="replace"
        )
        lines = found.stderr.splitlines()
        if found.returncode:
            raise SettingError(lines[-1] if lines else f"{' '.join(command)} failed")
        return lines

    def start(self) -> None:
        """Start and wait until `/v1/health` says ok, or leave nothing behind.

        Raises PortTakenError, ProcessDiedError or StartTimeoutError.
        """
        settings = self._settings
        require_free_port("the REST API's", settings.host, settings.port, "DLLM_PORT")
        # Its workers count together there, and each start begins with an empty one.
        self._metrics = tempfile.TemporaryDirectory(prefix="dllm-metrics-")
        process = GuardedProcess(
            self._command(),
            name="the adapter",
            env={**self._environment(), "PROMETHEUS_MULTIPROC_DIR": self._metrics.name},
            grace=CONNECTION_SECONDS + settings.drain_seconds + EXIT_SECONDS,
            on_log=self._on_log,
        )
        self._process = process
        try:
            self._wait_until_ready(process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it; does nothing when it is not running."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()
        if self._metrics is not None:
            self._metrics.cleanup()

    @property
    def _triton_url(self) -> str:
        return f"127.0.0.1:{self._settings.triton_grpc_port}"

    def _environment(self) -> dict[str, str]:
        ours = {"DLLM_TRITON_URL": self._triton_url, "DLLM_HOST": self._settings.host}
        return {**os.environ, **ours, **self._env}

    def _command(self) -> list[str]:
        settings = self._settings
        return [
            *(sys.executable, "-m", "adapter"),
            *("--host", settings.host, "--port", str(settings.port)),
            *("--workers", str(settings.workers)),
            *("--timeout-graceful-shutdown", str(CONNECTION_SECONDS)),
            *("--timeout-keep-alive", str(KEEP_ALIVE_SECONDS)),
        ]

    def _wait_until_ready(self, process: GuardedProcess) -> None:
        started = time.monotonic()
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while (state := _health(client, self._settings.url)) != "ok":
                if not process.running:
                    raise process.died()
                waited = time.monotonic() - started
                if waited > self._settings.start_timeout:
                    message = f"the adapter was not ready after {waited:.0f} s ({state})"
                    raise StartTimeoutError(message, process.tail())
                if self._on_wait is not None:
                    self._on_wait(waited, process.last_line)
                time.sleep(POLL_SECONDS)


def _health(client: httpx.Client, url: str) -> str:
    """`ok`, or why it is not."""
    try:
        response = client.get(f"{url}/v1/health")
    except httpx.TransportError as error:
        return str(error)
    return "ok" if response.is_success else response.text
