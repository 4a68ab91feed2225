"""The adapter's settings. Each is an environment variable: `DLLM_` and the field's name."""

import re
import sys
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapter.errors import SettingsError
from adapter.rates import Rate

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


#: libpq's parameters of a PostgreSQL address, and whether each names a file.
LIBPQ_PARAMETERS = {
    "sslmode": False,
    "sslrootcert": True,
    "sslcert": True,
    "sslkey": True,
    "sslcrl": True,
    "passfile": True,
}
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

OPEN_TO_ALL = (
    "everyone who reaches {host} may use the API (DLLM_HOST), since no key is needed: "
    "set DLLM_API_KEYS or DLLM_API_KEYS_FILE"
)
#: uvicorn's exit status for a worker that would fail again at each start.
STARTUP_FAILURE = 3


class Settings(BaseSettings):
    """The adapter's configuration, validated once at start; see `load_settings`."""

    # The engine has DLLM_ variables of its own, so unknown names are not errors.
    model_config = SettingsConfigDict(
        env_prefix="DLLM_", env_ignore_empty=True, extra="ignore", frozen=True
    )

    host: str = "127.0.0.1"
    """Address at which uvicorn publishes the API; the adapter warns if it is public and open."""
    triton_url: str = "127.0.0.1:8011"
    """Triton's gRPC address, host:port; separate several by commas.

    A DNS name may stand for several servers.
    """
    discovery_interval: Seconds = 10.0
    """Pause between two looks which tritonservers there are, and which models they have."""
    triton_ca_file: Path | None = None
    """CAs of Triton's certificate, in PEM; its gRPC port is reached by TLS if set."""
    triton_cert_file: Path | None = None
    """Certificate that Triton asks of the adapter, in PEM."""
    triton_key_file: Path | None = None
    """Its private key, in PEM."""
    triton_tls_name: str = ""
    """Name in Triton's certificate, if it is not the host of its address."""
    triton_protocol_keys_file: Path | None = None
    """A file of KEY=VALUE lines for Triton's restricted protocols."""
    model_name: str = "dllm"
    """The Triton model of calls that name none."""
    database_url: str = "sqlite:///./dllm-jobs.db"
    """Database of the jobs."""
    database_timeout: Seconds = 5.0
    """Longest database transaction; jobs are answered 503 beyond."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    """Text lines, or JSON lines."""
    tracing: bool = False
    """OpenTelemetry traces; needs the extra `otel`."""

    api_keys: str = ""
    """API keys as name:hash, separated by commas."""
    api_keys_file: Path | None = None
    """A file of name:hash lines, read again when it changes."""
    metrics_need_key: bool = False
    """/metrics requires a key too."""
    rate_limit: str = ""
    """Calls that one key or address may make, like 60/minute."""
    max_body_bytes: Count = 4 * 2**20
    """Largest body of a call."""
    body_timeout: Seconds = 30.0
    """Time in which the headers of a call must arrive, and then its body."""
    send_timeout: Seconds = 60.0
    """Time after which a client that does not read is cut off."""
    max_connections_per_address: Count = 4096
    """Connections that one worker process keeps open per address."""
    cors_origins: str = ""
    """Origins of web pages that may call, separated by commas; * for all."""

    max_prompt_chars: Count = 4096
    """Longest prompt in characters; also for all `messages` together, and for ids."""
    served_model_name: str = ""
    """Model name in OpenAI calls; the Triton model's name if empty."""
    chat_max_tokens: int = Field(default=128, ge=0)
    """Longest canvas of a chat completion that gives no length; 0: up to `max_gen_length`."""
    max_gen_length: Count = 512
    """Longest canvas of a request."""
    max_temperature: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    max_batch_size: Count = 64
    max_choices: Count = 16
    """Most prompts in one batch call."""
    max_timeout: Seconds = 86_400.0
    """Longest `timeout` of a request."""
    max_queued_jobs: Count = 10_000
    """Jobs that may wait; more are answered 429."""

    key_share: float = Field(default=0.5, gt=0, le=1)
    """Part of max_live, max_held_polls, max_queued_jobs, and of the bodies that are read at once,
    that one key may hold."""
    share_prefixes: bool = False
    """Requests of different API keys share the prefix cache.

    A caller can then find out whether another one has sent the same beginning.
    """
    max_inflight: Count = 256
    """Jobs that one worker process runs at a time."""
    max_live: Count = 256
    """Streams and OpenAI calls that one worker process serves at a time."""
    max_held_polls: Count = 1000
    """Polls that one worker process holds at a time."""
    heartbeat_interval: Seconds = 15.0
    """Longest pause between events of a stream to a client."""
    lease_seconds: Seconds = 30.0
    """Jobs of a worker that is silent for longer go to other workers."""
    job_max_attempts: Count = 3
    """How often a job is run if the engine dies."""
    drain_seconds: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    """Time in which running jobs may finish when a worker stops."""
    poll_interval: Seconds = 0.4
    """Pause between queries for other workers' jobs."""
    result_ttl: Seconds = 86_400.0
    """How long a result is kept."""

    stream_interval: Seconds = 2.5
    """Longest pause between heartbeats of a request."""
    engine_idle_timeout: Seconds = 60.0
    """Silence after which an engine counts as dead."""
    probe_interval: Seconds = 5.0
    """Silence after which the engine is probed."""

    @property
    def is_public(self) -> bool:
        """Whether other machines may reach the API, as far as its publisher says."""
        try:
            return not ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    @property
    def triton_urls(self) -> list[str]:
        """The addresses of all tritonservers."""
        return [url.strip() for url in self.triton_url.split(",")]

    @property
    def openai_model(self) -> str:
        """The name that OpenAI calls ask for."""
        return self.served_model_name or self.model_name

    @field_validator("triton_url")
    @classmethod
    def _addresses(cls, value: str) -> str:
        urls = [url.strip() for url in value.split(",")]
        for url in urls:
            host, _, port = url.rpartition(":")
            if not host or "/" in url or not (port.isdecimal() and 0 < int(port) < 65_536):
                msg = f"{url!r} should be host:port"
                raise ValueError(msg)
        if len(set(urls)) < len(urls):
            msg = "each address should be given once"
            raise ValueError(msg)
        return value

    @field_validator("database_url")
    @classmethod
    def _database_lasts(cls, value: str) -> str:
        file, server = r"sqlite(\+aiosqlite)?:///(?!:memory:).+", r"postgresql\+asyncpg://.+"
        if not re.fullmatch(f"{file}|{server}", value):
            # The value is not shown, as it may hold a password.
            msg = "should be sqlite:///FILE or postgresql+asyncpg://USER:PASSWORD@HOST/NAME"
            raise PydanticCustomError("database_url", msg)
        if value.startswith("sqlite"):
            folder = Path(value.partition(":///")[2].partition("?")[0]).absolute().parent
            if not folder.is_dir():
                msg = "the folder of the SQLite file does not exist: {folder}"
                raise PydanticCustomError("database_url", msg, {"folder": str(folder)})
        else:
            try:
                _ = urlsplit(value).port
            except ValueError:
                msg = "the port should be a number from 0 to 65535"
                raise PydanticCustomError("database_url", msg) from None
            _check_libpq(dict(parse_qsl(urlsplit(value).query)))
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: str) -> str:
        for origin in filter(None, map(str.strip, value.split(","))):
            if origin not in ("*", "null") and not re.fullmatch(r"[a-z][\w+.-]*://[^/\s]+", origin):
                msg = f"{origin!r} should be like https://chat.example.org, without a path, or *"
                raise ValueError(msg)
        return value

    @field_validator("rate_limit")
    @classmethod
    def _rate_is_one(cls, value: str) -> str:
        if value:
            try:
                Rate.parse_all(value)
            except ValueError:
                msg = "should be like 60/minute, or 5/second; 60/minute"
                raise ValueError(msg) from None
        return value

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.triton_cert_file is None) != (self.triton_key_file is None):
            msg = "DLLM_TRITON_CERT_FILE and DLLM_TRITON_KEY_FILE: should be set together"
            raise ValueError(msg)
        if self.triton_ca_file is None and (self.triton_cert_file or self.triton_tls_name):
            msg = (
                "DLLM_TRITON_CERT_FILE and DLLM_TRITON_TLS_NAME: should be set with "
                "DLLM_TRITON_CA_FILE only, which turns TLS on"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _silence_outlasts_the_signs_of_life(self) -> Self:
        if self.engine_idle_timeout < 2 * self.stream_interval:
            msg = (
                f"DLLM_ENGINE_IDLE_TIMEOUT={self.engine_idle_timeout:g}: should be at least twice "
                f"DLLM_STREAM_INTERVAL ({self.stream_interval:g})"
            )
            raise ValueError(msg)
        return self


def _check_libpq(parameters: Mapping[str, str]) -> None:
    mode = parameters.get("sslmode", "prefer")
    if mode not in SSL_MODES:
        msg = "sslmode should be one of {modes}"
        raise PydanticCustomError("database_url", msg, {"modes": ", ".join(SSL_MODES)})
    if mode.startswith("verify") and "sslrootcert" not in parameters:
        msg = "sslmode={mode} should come with sslrootcert=FILE, the CAs of the server"
        raise PydanticCustomError("database_url", msg, {"mode": mode})
    for name, is_file in LIBPQ_PARAMETERS.items():
        if is_file and name in parameters and not Path(parameters[name]).is_file():
            msg = "{name} should be a file: {file}"
            raise PydanticCustomError("database_url", msg, {"name": name, "file": parameters[name]})


def load_settings() -> Settings:
    """Read the environment. Raises `SettingsError` with each variable, value and reason."""
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(_problem(item) for item in error.errors())
        raise SettingsError(problems) from None


def refuse_start(problem: str) -> NoReturn:
    """End this process with a line instead of a traceback, and uvicorn's supervisor with it."""
    sys.stderr.write(f"the adapter cannot start: {problem}\n")
    raise SystemExit(STARTUP_FAILURE)


def _problem(error: Mapping[str, object]) -> str:
    location, reason = error["loc"], str(error["msg"]).removeprefix("Value error, ")
    if not isinstance(location, tuple) or not location:
        return reason
    name = f"DLLM_{str(location[0]).upper()}"
    # A database's address may hold a password.
    given = "" if error["type"] == "database_url" else f"={error['input']!r}"
    return f"{name}{given}: {reason}"
