"""Resolves the configured devices and libraries on this machine."""

from __future__ import annotations

import dataclasses
import logging

import torch

from dllm_engine.config import EngineConfig
from dllm_engine.errors import InvalidConfig
from dllm_engine.memory.plan import available_bytes, parse_limit
from dllm_engine.models.base import ModelSpec
from dllm_engine.ops.quantization import make_quantizer

logger = logging.getLogger("dllm_engine")


def import_libraries(config: EngineConfig) -> None:
    """Import what loading needs: it takes seconds, so ranks do it before they meet.

    Raises:
        InvalidConfig: a library is missing.
    """
    if config.quantization != "none":
        make_quantizer(config.quantization)


def resolve_device(config: EngineConfig) -> tuple[str, torch.dtype]:
    """Return the device (of the first rank) and number type to use on this machine.

    Raises:
        InvalidConfig: the device does not exist here.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidConfig(f"DLLM_DEVICE: {device} asked for, but no CUDA device is visible")
    if config.quantization == "w8a8" and device != "cpu":
        raise InvalidConfig(
            f"DLLM_QUANTIZATION: w8a8 is for CPUs; on {device}, set it to int8 or fp8"
        )
    name = config.dtype
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return device, getattr(torch, name)


def with_fitting_dtype(config: EngineConfig, spec: ModelSpec) -> EngineConfig:
    """Return `config` with bfloat16, if `auto` would be float32 and those weights do not fit.

    Decided once, before ranks start: they must all have the same type.
    """
    device, dtype = resolve_device(config)
    if config.dtype != "auto" or dtype != torch.float32:
        return config
    limit = parse_limit(config.memory_limit, available_bytes(device))
    if spec.weight_bytes(4, config.quantization) * spec.num_ranks <= limit:
        return config
    logger.warning("float32 weights do not fit into memory, so DLLM_DTYPE auto is bfloat16")
    return dataclasses.replace(config, dtype="bfloat16")


def rank_device(config: EngineConfig, rank: int) -> str:
    """Return the device of one of several ranks: consecutive GPUs, or the CPU.

    Raises:
        InvalidConfig: there are too few GPUs.
    """
    device, _ = resolve_device(config)
    if not device.startswith("cuda"):
        return device
    first, size = torch.device(device).index or 0, config.tensor_parallel_size
    count = torch.cuda.device_count()
    if first + size > count:
        message = (
            f"DLLM_TENSOR_PARALLEL_SIZE: {size} ranks from cuda:{first} on need a GPU each; this "
            f"machine has {count}"
        )
        if size <= count:
            message += (
                ". Triton makes an instance for every GPU by itself; give each instance the first "
                f"of its GPUs in config.pbtxt: instance_group [ {_instances(size, count)} ]"
            )
        raise InvalidConfig(message)
    return f"cuda:{first + rank}"


def _instances(size: int, count: int) -> str:
    """Write an instance per `size` of `count` GPUs, as config.pbtxt has it."""
    firsts = range(0, count - size + 1, size)
    return ", ".join(f"{{ count: 1 kind: KIND_GPU gpus: [ {first} ] }}" for first in firsts)
