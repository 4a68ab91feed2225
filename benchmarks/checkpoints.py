"""Checkpoints with random weights, for measurements that need a size but no meaning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.checkpoints import (
    dream_config,
    dream_shapes,
    llada_config,
    llada_shapes,
    write_llada,
)

#: Sizes and ids of GSAI-ML/LLaDA-8B-Instruct's config.json.
LLADA_8B: dict[str, Any] = {
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}
#: Sizes and ids of Dream-org/Dream-v0-Instruct-7B's config.json.
DREAM_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "mask_token_id": 151666,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
#: Bytes of one file.
_SHARD_BYTES = 4 * 2**30


def llada_60m(directory: Path) -> Path:
    """59 million parameters: 8 layers of width 512, vocabulary 32,768."""
    return write_llada(
        directory,
        tokenizer=False,
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        mlp_hidden_size=1376,
        vocab_size=32768,
        embedding_size=32768,
        max_sequence_length=1024,
    )


def random_bf16(directory: Path, family: str, device: str = "cpu", **overrides: Any) -> Path:
    """Write a checkpoint of `family` ("llada", "dream") in bfloat16 shards, unless it exists.

    Args:
        device: the device that makes the random numbers.
        **overrides: fields of config.json, such as `LLADA_8B`.

    Returns:
        `directory`.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    llada = family == "llada"
    config = llada_config(**overrides) if llada else dream_config(**overrides)
    shapes = llada_shapes(config) if llada else dream_shapes(config)
    (directory / "config.json").write_text(json.dumps(config))
    ends = {"eos_token_id": config["eos_token_id"]}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    generator = torch.Generator(device).manual_seed(1)
    shards = _shards(shapes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random(name, shapes[name], generator) for name in names}
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(names, file)
    # Written last, so that an interrupted run starts again.
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Tensor names by file, in order; at least two files, so that an index is needed."""
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    limit = min(_SHARD_BYTES, -(-total // 2))
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size >= limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * math.prod(shape)
    return shards


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random weights: ones for norms, else of the scale that models are initialised with."""
    if len(shape) == 1 and not name.endswith(".bias"):
        return torch.ones(shape, dtype=torch.bfloat16)
    made = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return made.normal_(std=0.02, generator=generator).cpu()
