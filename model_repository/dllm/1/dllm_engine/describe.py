"""Describes a checkpoint without loading it: `python -m dllm_engine.describe DIRECTORY`.

Prints JSON: family, sizes, and a memory plan for this machine and for well-known cards. All bytes
are computed from config.json as at an engine's start, but those of activations, which a start
measures and this module estimates.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dllm_engine.config import EngineConfig
from dllm_engine.errors import DllmError, InvalidConfig
from dllm_engine.execution.devices import resolve_device, with_fitting_dtype
from dllm_engine.execution.graphs import GRAPH_BYTES, LARGEST_ROWS, graph_sizes
from dllm_engine.execution.rank_model import (
    CHUNKS_PER_STEP,
    CPU_TOKEN_BUDGET,
    GPU_TOKEN_BUDGET,
    LEAST_CHUNK,
)
from dllm_engine.loop.validation import longest_sequence
from dllm_engine.memory.plan import (
    MemoryPlan,
    available_bytes,
    check_weights,
    page_bytes,
    parse_limit,
)
from dllm_engine.models.base import ModelSpec
from dllm_engine.models.loader import read_spec
from dllm_engine.ops.transfer import UPLOAD_BYTES
from dllm_engine.sampling.full_logits import least_bytes
from dllm_engine.state.canvas import LONGEST_BLOCK, CanvasTable

#: Memory of cards in MiB, as `nvidia-smi` reports it, without what a driver takes.
CARDS: Mapping[str, int] = {
    "L4": 23034,
    "RTX 4090": 24564,
    "RTX 5090": 32607,
    "A100 40GB": 40960,
    "L40S": 46068,
    "H100 80GB": 81559,
    "H200": 143771,
    "B200": 183359,
}
#: What a CUDA context and the display take of a card before the engine starts.
CONTEXT_BYTES = 600 * 2**20
#: What a step takes besides the rows' tensors: layouts, rotary tables, tiles of attention.
STEP_BYTES = 16 * 2**20
#: Splits that are tried where a model does not fit on one card.
RANKS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Whether, and how, a model fits on a device."""

    device: str
    #: Bytes of one device.
    memory: int
    dtype: str
    quantization: str
    #: Devices that the model is split over; 0: it fits on none of the tried numbers.
    num_ranks: int
    #: The plan of each device; None if it does not fit.
    plan: MemoryPlan | None
    #: Longest sequences whose keys and values fit at once.
    num_sequences: int = 0
    #: Why it does not fit.
    problem: str = ""


def estimate_activations(spec: ModelSpec, rows: int, element_size: int) -> int:
    """Estimate the bytes of a step of `rows` rows: one layer's tensors, none freed early."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim // spec.num_ranks
    rotated = (spec.num_heads + spec.num_kv_heads) * spec.head_dim // spec.num_ranks
    mixed = spec.num_heads * spec.head_dim // spec.num_ranks
    inner = spec.intermediate_size // spec.num_ranks
    width = 4 * spec.hidden_size + heads + rotated + mixed + 3 * inner
    return rows * width * element_size + STEP_BYTES


def plan_memory(
    config: EngineConfig, spec: ModelSpec, *, device: str, available: int, dtype: torch.dtype
) -> MemoryPlan:
    """Plan the memory of one device as an engine's start does, with estimated activations.

    Args:
        config: the settings; its `device` and `dtype` are not read.
        spec: the model, split already if it is to be.
        device: a name for messages; "cpu" for the CPU.
        available: free bytes of the device.

    Raises:
        InvalidConfig: the model does not fit; names the settings to change.
    """
    on_cpu = device == "cpu"
    limit = parse_limit(config.memory_limit, available)
    weights = spec.weight_bytes(dtype.itemsize, config.quantization)
    check_weights(weights, limit)
    budget = config.max_num_batched_tokens or (CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET)
    chunk = max(LEAST_CHUNK, budget // CHUNKS_PER_STEP)
    whole = 2 * spec.max_model_len if spec.blocks is None else max(chunk, LONGEST_BLOCK)
    rows = max(whole, budget)
    largest = 0 if on_cpu or spec.num_ranks > 1 else LARGEST_ROWS
    if config.cuda_graph_rows is not None:
        largest = config.cuda_graph_rows
    sizes = graph_sizes(largest)
    graphs = len(sizes) * GRAPH_BYTES
    if sizes:
        graphs += estimate_activations(spec, sizes[-1], dtype.itemsize)
    one = dataclasses.replace(config, max_num_seqs=1)
    table = CanvasTable.of(one, spec, spec.eos_token_ids, device="cpu", chunk=chunk)
    requests = config.max_num_seqs * (table.num_bytes if on_cpu else table.credits.num_bytes)
    return MemoryPlan(
        device=device,
        available=available,
        limit=limit,
        weights=weights,
        requests=requests + (0 if on_cpu else 2 * UPLOAD_BYTES),
        activations=estimate_activations(spec, rows, dtype.itemsize),
        logits=max(config.logits_budget_mb * 2**20, least_bytes(spec.vocab_size, dtype.itemsize)),
        graphs=graphs,
        page=page_bytes(spec, config.kv_page_size, dtype.itemsize),
        page_size=config.kv_page_size,
    ).with_pages(
        spec.max_model_len,
        config.max_num_seqs,
        needs_pages=config.cache != "none" or spec.blocks is not None,
    )


def fit(
    config: EngineConfig,
    spec: ModelSpec,
    *,
    device: str,
    memory: int,
    dtype: torch.dtype,
    ranks: tuple[int, ...],
) -> Fit:
    """Find the fewest devices, of `ranks`, on which the model fits.

    Args:
        memory: free bytes of one device.
        ranks: numbers of devices, ascending.
    """
    name = str(dtype).removeprefix("torch.")
    problem = ""
    for number in ranks:
        try:
            part = spec.split(number)
            plan = plan_memory(config, part, device=device, available=memory, dtype=dtype)
        except InvalidConfig as error:
            problem = problem or str(error)
            continue
        sequence = -(-spec.max_model_len // plan.page_size)
        most = plan.num_pages // sequence
        return Fit(device, memory, name, config.quantization, number, plan, most)
    return Fit(device, memory, name, config.quantization, 0, None, problem=problem)


def describe(config: EngineConfig) -> dict[str, Any]:
    """Describe the checkpoint of `config`, with a plan for this machine and for each card.

    Where a model does not fit on one card, int8 is tried before more cards.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        InvalidConfig: a setting does not fit the checkpoint or the machine.
    """
    whole = read_spec(config.model_path)
    spec = dataclasses.replace(whole, max_model_len=longest_sequence(config, whole))
    config = with_fitting_dtype(config, spec)
    device, dtype = resolve_device(config)
    here = fit(
        config,
        spec,
        device=device,
        memory=available_bytes(device),
        dtype=dtype,
        ranks=(config.tensor_parallel_size,),
    )
    cards = [_fit_card(config, spec, name, size) for name, size in CARDS.items()]
    weights = {
        "float32": spec.weight_bytes(4),
        "bfloat16": spec.weight_bytes(2),
        "int8": spec.weight_bytes(2, "int8"),
    }
    return {
        "architecture": spec.architecture,
        "parameters": spec.weight_bytes(1),
        "weight_bytes": weights,
        "kv_bytes_per_token": page_bytes(spec, 1, dtype.itemsize),
        "spec": dataclasses.asdict(spec),
        "here": dataclasses.asdict(here),
        "cards": [dataclasses.asdict(card) for card in cards],
    }


def _fit_card(config: EngineConfig, spec: ModelSpec, name: str, mebibytes: int) -> Fit:
    memory = mebibytes * 2**20 - CONTEXT_BYTES
    small = dataclasses.replace(config, quantization="int8", batch_invariant=False)
    tries = [(config, (1,)), (config, RANKS[1:])]
    if config.quantization == "none":
        tries.insert(1, (small, (1,)))
    results = [
        fit(one, spec, device=name, memory=memory, dtype=torch.bfloat16, ranks=ranks)
        for one, ranks in tries
    ]
    return next((each for each in results if each.num_ranks), results[0])


def main() -> int:
    """Describe the checkpoint that the arguments name, under the settings of the environment."""
    settings = {name: os.environ.get(name, "") for name in EngineConfig.settings()}
    settings["MODEL_PATH"] = str(Path(sys.argv[1]).absolute())
    try:
        described = describe(EngineConfig.from_mapping(settings))
    except DllmError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(described) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
