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
QUANTIZATIONS = ("none", "int8", "fp8", "w8a8")
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
    """Settings of one engine; the server sets every field (see `from_mapping`).

    Raises:
        InvalidConfig: a value is out of range; the message names the setting.
    """

    model_path: Path
    #: "auto" is CUDA if this machine has it, else the CPU.
    device: str = "auto"
    #: "auto" is float32 on a CPU and the checkpoint's own type (bfloat16) on a GPU.
    dtype: str = "auto"
    #: Stores the weights of the layers' linear maps in 8 bits (`ops.quantization`), all other
    #: weights in `dtype`.
    quantization: str = "none"
    #: Implementation of the layers: "torch", or kernels in the Triton language ("triton"); "auto"
    #: is the kernels on a GPU.
    kernels: str = "auto"
    #: Makes a request's tokens independent of the rest of the batch on a GPU, with slower matrix
    #: products. On a CPU they always are.
    batch_invariant: bool = False
    #: Rows of the largest step to replay from a CUDA graph; 0: no graphs; None: 512 for kernels on
    #: a GPU, else 0.
    cuda_graph_rows: int | None = None
    #: Rows that are enough to launch a step while another is in flight, so that a GPU does not wait
    #: for the host; 0: never; None: 1,024 on a GPU, never on a CPU or with several ranks.
    overlap_rows: int | None = None
    #: Most requests that run at once; others wait.
    max_num_seqs: int = 64
    #: Most requests that wait; others are rejected.
    max_queue_size: int = 4096
    #: Token budget: most rows of one denoising step; None: by device.
    max_num_batched_tokens: int | None = None
    #: Most tokens of prompt and canvas together; None: the length the checkpoint was trained for.
    max_model_len: int | None = None
    #: Most tokens of a canvas; None: all that fit into `max_model_len`.
    max_gen_length: int | None = None
    #: Memory for logits, in MiB.
    logits_budget_mb: int = 64
    #: Cache parameters of requests that set none (see `SamplingParams`).
    cache: str = "none"
    retention_ratio: float = 0.5
    pool_kernel: int = 3
    delay_steps: int = 0
    refresh_interval: int = 0
    #: Memory of the device that the engine may take: a size ("6GiB") or a fraction of what is free.
    memory_limit: str = "0.9"
    #: Rows of keys and values per page.
    kv_page_size: int = 32
    #: Keeps keys and values of earlier requests in free pages, for requests that begin alike; only
    #: for models whose keys and values are final.
    prefix_cache: bool = True
    #: Seconds that a step may take before the engine is given up; 0: no limit; None: 300 on a GPU,
    #: 3,600 on a CPU.
    step_timeout: float | None = None
    #: Ranks that the model is split over; each is a process with a GPU or a share of the CPU.
    tensor_parallel_size: int = 1
    #: Seconds that a rank waits for the others within a step before the engine is given up.
    tensor_parallel_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        if not _DEVICE.fullmatch(self.device):
            raise InvalidConfig(
                f"DLLM_DEVICE: must be auto, cpu, cuda or cuda:N, got {self.device!r}"
            )
        choices = {"dtype": DTYPES, "kernels": KERNELS, "quantization": QUANTIZATIONS}
        for name, known in choices.items():
            self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        for name in ("max_num_seqs", "logits_budget_mb", "kv_page_size", "tensor_parallel_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_num_batched_tokens", "max_model_len", "max_gen_length"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1, or empty")
        self._require("max_queue_size", self.max_queue_size >= 0, "at least 0")
        for name in ("cuda_graph_rows", "overlap_rows", "step_timeout"):
            value = getattr(self, name) or 0
            self._require(name, 0 <= value < math.inf, "at least 0, or empty")
        timeout = self.tensor_parallel_timeout
        self._require("tensor_parallel_timeout", 0 < timeout < math.inf, "above 0")
        if self.overlap_rows and self.tensor_parallel_size > 1:
            raise InvalidConfig(
                "DLLM_OVERLAP_ROWS: ranks take one step at a time (DLLM_TENSOR_PARALLEL_SIZE)"
            )
        self._check_quantization()
        try:
            SamplingParams().with_cache_defaults(self.cache_defaults)
        except InvalidRequest as error:
            raise InvalidConfig(f"DLLM_{error.field.upper()}: {error.problem}") from None

    def _require(self, name: str, rule: bool, wanted: str) -> None:
        if not rule:
            raise InvalidConfig(f"{_setting(name)}: must be {wanted}, got {getattr(self, name)}")

    def _check_quantization(self) -> None:
        kind = self.quantization
        if kind != "none" and self.batch_invariant:
            raise InvalidConfig("DLLM_BATCH_INVARIANT: cannot be combined with DLLM_QUANTIZATION")
        if kind != "none" and self.dtype == "float64":
            raise InvalidConfig(
                f"DLLM_QUANTIZATION: {kind} with DLLM_DTYPE float64 would be exact sums of rounded "
                "weights; set DLLM_DTYPE to float32 or bfloat16"
            )
        if kind in ("int8", "w8a8") and self.dtype == "float16":
            raise InvalidConfig(
                f"DLLM_QUANTIZATION: {kind} with DLLM_DTYPE float16 overflows, since products are "
                "scaled after they are summed; set DLLM_DTYPE to bfloat16, or DLLM_QUANTIZATION "
                "to fp8"
            )

    @property
    def cache_defaults(self) -> dict[str, object]:
        """Cache parameters of requests that set none."""
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
