"""Settings of the launcher; each is an environment variable with the prefix DLLM_."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

CHECKOUT = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """Where the parts listen and what they load; raises ValidationError for a bad value."""

    model_config = SettingsConfigDict(
        env_prefix="DLLM_", env_ignore_empty=True, frozen=True, protected_namespaces=()
    )

    host: str = "127.0.0.1"
    """Address of the REST API; 0.0.0.0 for all."""
    port: int = Field(8000, ge=1, le=65535)
    """Port of the REST API."""
    workers: int = Field(1, ge=1)
    """Adapter processes; any of them answers for any job."""
    triton_http_port: int = Field(8010, ge=1, le=65535)
    """Triton's HTTP port."""
    triton_grpc_port: int = Field(8011, ge=1, le=65535)
    """Triton's gRPC port."""
    triton_metrics_port: int = Field(8012, ge=1, le=65535)
    """Triton's metrics port."""
    model_repository: Path = CHECKOUT / "model_repository"
    """Folder with the models `dllm` and `dllm_unary`."""
    start_timeout: float = Field(300.0, gt=0, allow_inf_nan=False)
    """Seconds each part may take to be ready."""
    drain_seconds: float = Field(5.0, ge=0, allow_inf_nan=False)
    """Time that the adapter takes for its running jobs when it is stopped."""

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        names: dict[int, str] = {}
        for name in ("port", "triton_http_port", "triton_grpc_port", "triton_metrics_port"):
            port, setting = getattr(self, name), f"DLLM_{name.upper()}"
            if port in names:
                msg = f"{setting}={port}: should differ from {names[port]}"
                raise ValueError(msg)
            names[port] = setting
        return self

    @property
    def url(self) -> str:
        """The address at which this machine reaches the REST API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @classmethod
    def with_options(cls, **options: Any) -> Self:
        """The environment's settings, with the options that are not None in their place."""
        return cls(**{name: value for name, value in options.items() if value is not None})
