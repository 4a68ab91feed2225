"""Engine settings: one frozen dataclass, validated once, read from a mapping of strings."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dllm_engine.errors import InvalidConfig, InvalidRequest
from dllm_engine.sampling_params import CACHE_FIELDS, SamplingParams

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
KERNELS = ("auto", "torch", "triton")
QUANTIZATIONS = ("none", "int8", "fp8")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
#: What a field's type allows, and its name in an error.
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "Path": ((Path,), "a path"),
    "str": ((str,), "a string"),
    "bool": ((bool,), "True or False"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
}
_SWITCH = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one engine runs. Every field is a setting of the server (see `from_mapping`).

    Raises:
        InvalidConfig: a value is out of range; the message names the setting.
    """

    model_path: Path
    #: "auto" takes CUDA where there is one, else the CPU.
    device: str = "auto"
    #: "auto" is float32 on a CPU and the checkpoint's own type (bfloat16) on a GPU.
    dtype: str = "auto"
    #: Weights of the layers' linear maps in 8 bits (`ops.quantization`); the rest keeps `dtype`.
    quantization: str = "none"
    #: What layers run on: torch's operations, or kernels in the Triton language; "auto" takes the
    #: kernels on a GPU.
    kernels: str = "auto"
    #: On a GPU, a request's tokens must not depend on what else is in the batch, at the cost of
    #: slower products. On a CPU they never do.
    batch_invariant: bool = False
    #: Rows of the largest step that is replayed from a CUDA graph; 0: none is; None: 512 where
    #: kernels run on a GPU.
    cuda_graph_rows: int | None = None
    #: Rows from which on a step is launched while another is under way, so that a GPU does not wait
    #: for the host; 0: never; None: 1,024 on a GPU, never on a CPU or with several ranks.
    overlap_rows: int | None = None
    #: Requests that run at once; more wait.
    max_num_seqs: int = 64
    #: Requests that wait; more are refused.
    max_queue_size: int = 4096
    #: Token budget: rows that one denoising step may push through the model; None: by device.
    max_num_batched_tokens: int | None = None
    #: Prompt plus canvas, in tokens; None: what the checkpoint was trained for.
    max_model_len: int | None = None
    #: Largest canvas, in tokens; None: whatever fits into `max_model_len`.
    max_gen_length: int | None = None
    #: Memory that logits may take at any moment, in MiB.
    logits_budget_mb: int = 64
    #: Key/value reuse between steps, for requests that do not say (see `SamplingParams`).
    cache: str = "none"
    retention_ratio: float = 0.5
    pool_kernel: int = 3
    delay_steps: int = 0
    refresh_interval: int = 0
    #: Memory of the device that the engine may take: a size ("6GiB") or a fraction of what is free.
    memory_limit: str = "0.9"
    #: Rows of keys and values per page.
    kv_page_size: int = 32
    #: Seconds after which a step that has not ended is given up, and the engine with it; 0: never;
    #: None: 300 on a GPU, 3,600 on a CPU.
    step_timeout: float | None = None
    #: Ranks that share the model, each with a process of its own and a GPU, or a share of the CPU.
    tensor_parallel_size: int = 1
    #: Seconds that a rank waits for the others within a step before it is given up.
    tensor_parallel_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        if not _DEVICE.fullmatch(self.device):
            raise InvalidConfig(
                f"DLLM_DEVICE: must be auto, cpu, cuda or cuda:N, got {self.device!r}"
            )
        if self.dtype not in DTYPES:
            raise InvalidConfig(f"DLLM_DTYPE: must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.kernels not in KERNELS:
            known = ", ".join(KERNELS)
            raise InvalidConfig(f"DLLM_KERNELS: must be one of {known}, got {self.kernels}")
        self._check_quantization()
        for name in ("max_num_seqs", "logits_budget_mb", "kv_page_size", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise InvalidConfig(
                    f"{_setting(name)}: must be at least 1, got {getattr(self, name)}"
                )
        for name in ("max_num_batched_tokens", "max_model_len", "max_gen_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"{_setting(name)}: must be at least 1, or empty, got {value}")
        if self.max_queue_size < 0:
            raise InvalidConfig(
                f"DLLM_MAX_QUEUE_SIZE: must be at least 0, got {self.max_queue_size}"
            )
        for name in ("cuda_graph_rows", "overlap_rows"):
            if (getattr(self, name) or 0) < 0:
                raise InvalidConfig(
                    f"{_setting(name)}: must be at least 0, or empty, got {getattr(self, name)}"
                )
        if self.overlap_rows and self.tensor_parallel_size > 1:
            raise InvalidConfig(
                "DLLM_OVERLAP_ROWS: ranks take one step at a time (DLLM_TENSOR_PARALLEL_SIZE)"
            )
        if not 0 <= (self.step_timeout or 0) < math.inf:
            raise InvalidConfig(
                f"DLLM_STEP_TIMEOUT: must be at least 0, or empty, got {self.step_timeout}"
            )
        if not 0 < self.tensor_parallel_timeout < math.inf:
            raise InvalidConfig(
                f"DLLM_TENSOR_PARALLEL_TIMEOUT: must be above 0, got {self.tensor_parallel_timeout}"
            )

        try:
            SamplingParams().with_cache_defaults(self.cache_defaults)
        except InvalidRequest as error:
            raise InvalidConfig(f"DLLM_{error.field.upper()}: {error.problem}") from None

    def _check_quantization(self) -> None:
        kind = self.quantization
        if kind != "none" and self.batch_invariant:
            raise InvalidConfig("DLLM_BATCH_INVARIANT: cannot be combined with DLLM_QUANTIZATION")
        if kind not in QUANTIZATIONS:
            known = ", ".join(QUANTIZATIONS)
            raise InvalidConfig(f"DLLM_QUANTIZATION: must be one of {known}, got {kind}")
        if kind != "none" and self.dtype == "float64":
            raise InvalidConfig(
                f"DLLM_QUANTIZATION: {kind} with DLLM_DTYPE float64 would be exact sums of rounded "
                "weights; set DLLM_DTYPE to float32 or bfloat16"
            )
        if kind == "int8" and self.dtype == "float16":
            raise InvalidConfig(
                "DLLM_QUANTIZATION: int8 with DLLM_DTYPE float16 overflows, since products are "
                "scaled after they are summed; set DLLM_DTYPE to bfloat16, or DLLM_QUANTIZATION "
                "to fp8"
            )

    @property
    def cache_defaults(self) -> dict[str, object]:
        """The caching of requests that do not choose one."""
        return {name: getattr(self, name) for name in CACHE_FIELDS}

    @classmethod
    def from_mapping(cls, settings: Mapping[str, str]) -> EngineConfig:
        """Build a config from setting names (`MODEL_PATH`, `DLLM_MAX_NUM_SEQS`, …) and strings.

        An empty string means the default.

        Raises:
            InvalidConfig: a setting is unknown, missing or does not parse.
        """
        fields = {_setting(f.name): f for f in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - set(fields))
        if unknown:
            raise unknown_setting(unknown[0], fields)
        values: dict[str, object] = {}
        for name, text in settings.items():
            if text != "":
                values[fields[name].name] = _parse(name, str(fields[name].type), text)
        if "model_path" not in values:
            raise InvalidConfig("MODEL_PATH: missing")
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def settings(cls) -> list[str]:
        """Names of all settings, as `from_mapping` takes them."""
        return [_setting(f.name) for f in dataclasses.fields(cls)]


def unknown_setting(name: str, known: Iterable[str]) -> InvalidConfig:
    """The error for a setting that is none, with the one that was probably meant."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return InvalidConfig(f"unknown setting {name}; {hint}")


def _check_type(name: str, kind: str, value: object) -> None:
    """Refuse a value of another type, which strings of the environment never have."""
    wanted, _, optional = kind.partition(" | ")
    if value is None and optional:
        return
    types, words = _TYPES[wanted]
    if not isinstance(value, types) or (wanted != "bool" and isinstance(value, bool)):
        raise InvalidConfig(f"{_setting(name)}: must be {words}, got {value!r}")


def _setting(field: str) -> str:
    return "MODEL_PATH" if field == "model_path" else f"DLLM_{field.upper()}"


def _parse(name: str, kind: str, text: str) -> object:
    if kind == "Path":
        return Path(text)
    if kind == "bool":
        if text.lower() not in _SWITCH:
            raise InvalidConfig(f"{name}: must be on or off, got {text!r}")
        return _SWITCH[text.lower()]
    try:
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
    except ValueError:
        wanted = "a whole number" if kind.startswith("int") else "a number"
        raise InvalidConfig(f"{name}: must be {wanted}, got {text!r}") from None
    return text
