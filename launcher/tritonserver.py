"""Run a real tritonserver over a model repository, as a context manager."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from launcher.errors import (
    LaunchError,
    ProcessDiedError,
    RepositoryError,
    SettingError,
    StartTimeoutError,
)
from launcher.installation import ascii_path, find_installation, make_scratch
from launcher.ports import free_port, require_free_port
from launcher.process import GuardedProcess, LogCallback

DEFAULT_MODELS = ("dllm", "dllm_unary")
POLL_SECONDS = 0.1
#: How the log shows that the engine refuses a setting or its checkpoint.
REFUSAL = re.compile(r"Python stub: (?:InvalidConfig|CheckpointError): (.+?)(?:\\n|$)")

#: Called about ten times a second while waiting, with the seconds waited and the newest log line.
WaitCallback = Callable[[float, str], None]


class TritonServer:
    """tritonserver with every model of a repository, listening on three ports of `address`.

    Entering starts it and returns once every model is ready; leaving ends it with all its
    processes and shared memory. The end of this process, however it ends, does the same. Port
    0 stands for any free port. `env` is added to this process's environment.

    `on_log` gets every log line, from another thread, and must not raise; `on_wait` is called
    while the models load. Entering raises ServerMissingError, RepositoryError, PortTakenError,
    SettingError (the engine refuses a setting or its checkpoint), ProcessDiedError (a model failed
    to load: the message ends with the server's log) or StartTimeoutError.
    """

    def __init__(
        self,
        repository: Path | str,
        *,
        models: Sequence[str] = DEFAULT_MODELS,
        address: str = "127.0.0.1",
        http_port: int = 8010,
        grpc_port: int = 8011,
        metrics_port: int = 8012,
        start_timeout: float = 300.0,
        exit_timeout: int = 5,
        log_verbose: int = 0,
        env: Mapping[str, str] | None = None,
        extra_args: Sequence[str] = (),
        on_log: LogCallback | None = None,
        on_wait: WaitCallback | None = None,
        log_file: Path | None = None,
    ) -> None:
        self.repository = Path(repository).resolve()
        self.models = tuple(models)
        self.address = address
        self.http_port = http_port or free_port(address)
        self.grpc_port = grpc_port or free_port(address)
        self.metrics_port = metrics_port or free_port(address)
        self.start_timeout = start_timeout
        self.exit_timeout = exit_timeout
        self.log_verbose = log_verbose
        self._env = dict(env or {})
        self._extra_args = tuple(extra_args)
        self._on_log = on_log
        self._on_wait = on_wait
        self._log_file = log_file
        self._process: GuardedProcess | None = None

    @property
    def http_url(self) -> str:
        """`host:port`, as tritonclient wants it."""
        return f"{self._host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """`host:port`, as tritonclient wants it."""
        return f"{self._host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """The whole address of the Prometheus page."""
        return f"http://{self._host}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """The process id of tritonserver itself. Raises RuntimeError before the start."""
        return self._started.pid

    @property
    def running(self) -> bool:
        """Whether the process runs: false before its start and after any end."""
        return self._process is not None and self._process.running

    @property
    def log_tail(self) -> list[str]:
        """The last lines the server and its models wrote."""
        return self._process.tail() if self._process is not None else []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until ready; raises as described above, and leaves nothing behind."""
        self.spawn()
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def spawn(self) -> None:
        """Start without waiting for the models."""
        if self._process is not None:
            raise RuntimeError("this server is started already")
        self._check_repository()
        self._check_ports()
        installation = find_installation()
        scratch = make_scratch()
        shm_prefix = f"dllm_{os.getpid()}_{secrets.token_hex(4)}_"
        repository = ascii_path(self.repository, scratch / "models")
        command = [str(installation.binary), *self._arguments(repository, shm_prefix)]
        backends = installation.make_backend_directory(scratch)
        if backends is not None:
            command.append(f"--backend-directory={backends}")
        self._process = GuardedProcess(
            [*command, *self._extra_args],
            name="tritonserver",
            env=installation.environment(self._environment(scratch), scratch),
            grace=self.exit_timeout + 5.0,
            shm_prefix=shm_prefix,
            scratch=scratch,
            on_log=self._on_log,
            log_file=self._log_file,
        )

    def stop(self) -> None:
        """End the server and everything it started; does nothing when it is not running."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def wait(self) -> None:
        """Block while the server runs. Raises ProcessDiedError when it has ended."""
        process = self._started
        while process.running:
            time.sleep(POLL_SECONDS)
        raise process.died()

    def is_ready(self, client: httpx.Client) -> bool:
        """Whether the server says that it and each of its models are ready."""
        paths = ["/v2/health/ready", *(f"/v2/models/{name}/ready" for name in self.models)]
        with contextlib.suppress(httpx.TransportError):
            return all(client.get(f"http://{self.http_url}{path}").is_success for path in paths)
        return False

    @property
    def _host(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)
        return f"[{host}]" if ":" in host else host

    @property
    def _started(self) -> GuardedProcess:
        if self._process is None:
            raise RuntimeError("this server is not running")
        return self._process

    def _check_repository(self) -> None:
        for name in self.models:
            if not (self.repository / name).is_dir():
                raise RepositoryError(
                    f"model repository {self.repository} has no model {name!r}: "
                    "set DLLM_MODEL_REPOSITORY to the folder that holds it"
                )

    def _check_ports(self) -> None:
        for what, port, setting in (
            ("Triton's HTTP", self.http_port, "DLLM_TRITON_HTTP_PORT"),
            ("Triton's gRPC", self.grpc_port, "DLLM_TRITON_GRPC_PORT"),
            ("Triton's metrics", self.metrics_port, "DLLM_TRITON_METRICS_PORT"),
        ):
            require_free_port(what, self.address, port, setting)

    def _environment(self, scratch: Path) -> dict[str, str]:
        env = {**os.environ, **self._env}
        if checkpoint := env.get("MODEL_PATH"):
            env["MODEL_PATH"] = str(ascii_path(Path(checkpoint), scratch / "checkpoint"))
        return env

    def _arguments(self, repository: Path, shm_prefix: str) -> list[str]:
        return [
            f"--model-repository={repository}",
            # Completing a configuration imports the model once more, which takes seconds of torch.
            "--disable-auto-complete-config",
            f"--http-address={self.address}",
            f"--http-port={self.http_port}",
            f"--grpc-address={self.address}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-address={self.address}",
            f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={self.exit_timeout}",
            f"--log-verbose={self.log_verbose}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        ]

    def _wait_until_ready(self) -> None:
        process, started = self._started, time.monotonic()
        # Our own server is reached without the environment's proxies.
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while not self.is_ready(client):
                if not process.running:
                    raise _refusal(process.died())
                waited = time.monotonic() - started
                if waited > self.start_timeout:
                    message = f"tritonserver was not ready after {self.start_timeout:.0f} s"
                    raise StartTimeoutError(message, process.tail())
                if self._on_wait is not None:
                    self._on_wait(waited, process.last_line)
                time.sleep(POLL_SECONDS)


def _refusal(death: ProcessDiedError) -> LaunchError:
    """The engine's own words, if it refused its settings or its checkpoint; else `death`."""
    for line in death.log_tail:
        if found := REFUSAL.search(line):
            return SettingError(found[1].replace('\\"', '"'))
    return death
