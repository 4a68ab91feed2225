"""Loads Hugging Face checkpoint directories without remote code, and checks all tensors.

The model is built on the meta device. Each parameter is filled directly from the file, and
quantised before the next one is read, so memory never holds a second copy of the model, nor all of
it in a wider type. Only safetensors are read, since pickles can run code.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_engine.errors import CheckpointError
from dllm_engine.models import dream, fast_dllm, illada, llada, nemotron, sdar
from dllm_engine.models.base import (
    DiffusionModel,
    ModelSpec,
    is_added_once,
    is_quantizable,
    split_dim,
    stacked_rows,
)
from dllm_engine.models.files import find_mask_token, read_json, read_json_if_there
from dllm_engine.ops.dispatch import TORCH, Operations
from dllm_engine.ops.quantization import make_quantizer
from dllm_engine.parallel.group import Group

_FAMILIES: dict[str, ModuleType] = {
    **dict.fromkeys(llada.ARCHITECTURES, llada),
    **dict.fromkeys(dream.ARCHITECTURES, dream),
    **dict.fromkeys(illada.ARCHITECTURES, illada),
    **dict.fromkeys(sdar.ARCHITECTURES, sdar),
    **dict.fromkeys(fast_dllm.ARCHITECTURES, fast_dllm),
    **dict.fromkeys(nemotron.ARCHITECTURES, nemotron),
}
#: Families whose class has had several names.
_BY_MODEL_TYPE: dict[str, ModuleType] = {illada.MODEL_TYPE: illada}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: `owner/name`, as the Hugging Face Hub names a model.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Sizes that every model must have.
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "max_model_len"),
)
#: Supported types of weights. Other types are quantised and need scales, which are not supported.
_DTYPES = ("BF16", "F16", "F32", "F64")

#: Called with the number of loaded parameters and of all parameters.
Progress = Callable[[int, int], None]


def read_spec(directory: Path) -> ModelSpec:
    """Read the model's `config.json`, and the stop tokens of `generation_config.json`.

    Raises:
        CheckpointError: files or fields are missing, or the family is unknown.
    """
    _check_files(directory)
    config = read_json(directory / "config.json")
    architecture = (config.get("architectures") or ["none given"])[0]
    model_type = str(config.get("model_type")).lower()
    family = _BY_MODEL_TYPE.get(model_type) or _FAMILIES.get(architecture)
    if family is None:
        known = ", ".join(_FAMILIES)
        raise CheckpointError(f"config.json: architecture {architecture}; supported: {known}")
    mask = find_mask_token(directory, config, *getattr(family, "MASK_TOKEN", (None, None)))
    config |= {} if mask is None else {"mask_token_id": mask}
    generation = read_json_if_there(directory / "generation_config.json")
    stop_ids = _stop_ids([config, generation])
    for key, value in config.items():
        if isinstance(value, str) and value.isdigit():
            raise CheckpointError(f"config.json: {key}: must be a number, not text: {value!r}")
    try:
        spec: ModelSpec = family.spec(config, stop_ids)
    except KeyError as error:
        raise CheckpointError(f"config.json: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {error}") from error
    for name in _SIZES:
        value = getattr(spec, name)
        if not isinstance(value, int) or value < 1:
            problem = f"{name}: must be a number of at least 1, not {value!r}"
            raise CheckpointError(f"config.json: {problem}")
    if not 0 <= spec.mask_token_id < spec.vocab_size:
        problem = f"{spec.mask_token_id}, beyond the vocabulary of {spec.vocab_size}"
        raise CheckpointError(f"config.json: mask_token_id: {problem}")
    return spec


def family_of(architecture: str) -> str:
    """The name of the family that serves an architecture: `llada`, `dream`."""
    return _FAMILIES[architecture].__name__.rpartition(".")[2]


def _check_files(directory: Path) -> None:
    """Report all missing files in one error, before any of them is read."""
    if not directory.is_dir():
        problem = "no such directory"
        if _HUB_ID.fullmatch(str(directory)):
            problem += (
                ". To serve this model of the Hugging Face Hub, download it: "
                f"hf download {directory} --local-dir {directory.name}; then set MODEL_PATH to "
                "that directory"
            )
        raise CheckpointError(f"MODEL_PATH: {directory}: {problem}")
    problems = [] if (directory / "config.json").exists() else ["no config.json"]
    if not (directory / _INDEX).exists() and not (directory / _SINGLE).exists():
        problems.append(_no_weights(directory))
    if problems:
        raise CheckpointError(f"MODEL_PATH: {directory}: {', '.join(problems)}")


def _no_weights(directory: Path) -> str:
    pickles = [p.name for p in directory.glob("*.bin")]
    hint = f" ({pickles[0]} is a pickle; pickles are not supported)" if pickles else ""
    return f"neither {_SINGLE} nor {_INDEX}{hint}"


def load_model(
    directory: Path,
    spec: ModelSpec,
    *,
    device: str,
    dtype: torch.dtype,
    progress: Progress | None = None,
    group: Group | None = None,
    operations: Operations = TORCH,
    quantization: str = "none",
) -> DiffusionModel:
    """Load the weights into a model on `device`; of a split model, this rank's part.

    See `DiffusionModel` for `group` and `operations`. With a `quantization` (see
    `ops.quantization`), at most one linear map is in `dtype` at a time. Each rank quantises its own
    part, so scales of maps that are split by inputs differ between ranks.

    Raises:
        InvalidConfig: the quantisation library is not installed.
        CheckpointError: tensors are missing or unexpected, or have the wrong shape or type; names
            all of them.
    """
    quantize = None if quantization == "none" else make_quantizer(quantization)
    with torch.device("meta"):
        model = DiffusionModel(spec, group, operations)
        whole = DiffusionModel(dataclasses.replace(spec, num_ranks=1))
    table: dict[str, tuple[str, ...]] = _FAMILIES[spec.architecture].tensors(spec)
    wanted = dict(model.named_parameters())
    with _Checkpoint(directory) as checkpoint:
        _check(table, dict(whole.named_parameters()), spec, checkpoint)
        for done, (name, parameter) in enumerate(wanted.items(), start=1):
            filled = torch.empty(parameter.shape, device=device, dtype=dtype)
            row = 0
            for source in table[name]:
                part = checkpoint.part(source, split_dim(name), group)
                filled[row : row + part.shape[0]].copy_(part)
                row += part.shape[0]
            if group is not None and group.rank and is_added_once(name):
                filled.zero_()
            if quantize is not None and is_quantizable(name):
                filled = quantize(filled)
            _replace_parameter(model, name, filled)
            if progress:
                progress(done, len(wanted))
    model.prepare()
    return model.eval()


def _stop_ids(sources: list[dict[str, Any]]) -> tuple[int, ...]:
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        ids.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(ids))


def _check(
    table: Mapping[str, tuple[str, ...]],
    wanted: Mapping[str, Tensor],
    spec: ModelSpec,
    checkpoint: _Checkpoint,
) -> None:
    """Report all problems of a checkpoint's tensors in one error."""
    expected = {source for sources in table.values() for source in sources}
    ignored = getattr(_FAMILIES[spec.architecture], "IGNORED", ())
    problems = [f"missing {name}" for name in sorted(expected - checkpoint.names)]
    unexpected = checkpoint.names - expected - set(ignored)
    problems += [f"unexpected {name}" for name in sorted(unexpected)]
    for name, parameter in wanted.items():
        rows = stacked_rows(spec, name) or (parameter.shape[0],)
        for source, count in zip(table[name], rows, strict=True):
            if source in checkpoint.names:
                shape = (count, *parameter.shape[1:])
                problems += _problems_of(source, shape, checkpoint)
    if problems:
        raise CheckpointError(f"{checkpoint.directory}: tensors: {'; '.join(problems)}")


def _problems_of(source: str, shape: tuple[int, ...], checkpoint: _Checkpoint) -> list[str]:
    problems = []
    found, dtype = checkpoint.shape(source), checkpoint.dtype(source)
    if found != shape:
        problems.append(f"{source}: shape {list(found)}, expected {list(shape)}")
    if dtype not in _DTYPES:
        problems.append(f"{source}: {dtype}, expected one of {', '.join(_DTYPES)}")
    return problems


def _replace_parameter(model: torch.nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))


@dataclasses.dataclass
class _Checkpoint:
    """Tensors of a single-file or sharded safetensors checkpoint, read lazily."""

    directory: Path

    def __enter__(self) -> _Checkpoint:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for file in self._file_names():
            path = self.directory / file
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                self._stack.close()
                raise CheckpointError(f"{path}: {error}") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))
        self.names = frozenset(self._files)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _file_names(self) -> list[str]:
        if (self.directory / _INDEX).exists():
            weight_map = read_json(self.directory / _INDEX).get("weight_map")
            files = list(weight_map.values()) if isinstance(weight_map, dict) else []
            if not files or not all(isinstance(file, str) for file in files):
                problem = "weight_map: must map tensor names to file names"
                raise CheckpointError(f"{self.directory / _INDEX}: {problem}")
            return sorted(set(files))
        if (self.directory / _SINGLE).exists():
            return [_SINGLE]
        raise CheckpointError(f"{self.directory}: {_no_weights(self.directory)}")

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The name of the type in safetensors: BF16, F32, I8, …"""
        return str(self._files[name].get_slice(name).get_dtype())

    def part(self, name: str, dim: int | None, group: Group | None) -> Tensor:
        """Read this rank's part of a tensor that is split along `dim`."""
        tensor: Tensor
        if group is None or dim is None:
            tensor = self._files[name].get_tensor(name)
            return tensor
        size = self.shape(name)[dim] // group.size
        mine = slice(group.rank * size, (group.rank + 1) * size)
        view = self._files[name].get_slice(name)
        tensor = view[mine] if dim == 0 else view[:, mine]
        return tensor
