"""Logits of a checkpoint under any mask, by transformers' own class of its architecture.

No remote code, and no `from_pretrained`: transformers 5 leaves buffers of such models unset.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .oracle import read_tensors, widen_norms
from .reference import Forward

#: Token ids [length] and which of them each sees, [length, length] bool, to logits [length, vocab].
MaskedForward = Callable[[Tensor, Tensor], Tensor]

_CLASSES: dict[str, tuple[Any, Any]] = {
    "SDARForCausalLM": (Qwen3Config, Qwen3ForCausalLM),
    "Fast_dLLM_QwenForCausalLM": (Qwen2Config, Qwen2ForCausalLM),
    "NemotronLabsDiffusionModel": (Ministral3Config, Ministral3ForCausalLM),
    "ILLaDAForCausalLM": (LlamaConfig, LlamaForCausalLM),
}
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings"
)


def native(directory: Path, dtype: torch.dtype) -> MaskedForward:
    """The checkpoint's logits, by transformers' Qwen3, Qwen2, Ministral3 or Llama."""
    config = json.loads((directory / "config.json").read_text())
    make_config, make_model = _CLASSES[config["architectures"][0]]
    optional = ("attention_bias", "mlp_bias")
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta")}
    model = make_model(
        make_config(
            **{key: config[key] for key in _SIZES.split()},
            **{key: config[key] for key in optional if key in config},
            head_dim=width,
            rope_parameters=config.get("rope_parameters", rope),
        )
    )
    tensors = {_name(name): tensor for name, tensor in read_tensors(directory).items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors, strict=True)
    return _forward(model, dtype)


def both_ways(forward: MaskedForward) -> Forward:
    """The logits where each token sees all others."""

    def run(tokens: Tensor) -> Tensor:
        return forward(tokens, torch.ones(len(tokens), len(tokens), dtype=torch.bool))

    return run


def block_causal(length: int, block_length: int) -> Tensor:
    """Each token sees its own block and earlier ones; blocks are counted from position 0."""
    block = torch.arange(length) // block_length
    return block[:, None] >= block[None, :]


def causal_before(length: int, start: int) -> Tensor:
    """Each token sees itself and earlier ones; those from `start` on see each other, too."""
    position = torch.arange(length)
    active = position >= start
    return (position[:, None] >= position[None, :]) | (active[:, None] & active[None, :])


def _name(name: str) -> str:
    """The class's name of a tensor; Nemotron's files have others."""
    if name == "diffusion_head.weight":
        return "lm_head.weight"
    return name.replace("encoder.", "model.", 1) if name.startswith("encoder.") else name


def _forward(model: nn.Module, dtype: torch.dtype) -> MaskedForward:
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        widen_norms(model)

    @torch.inference_mode()
    def forward(tokens: Tensor, seen: Tensor) -> Tensor:
        logits: Tensor = model(tokens[None], attention_mask=seen[None, None]).logits[0]
        return logits

    return forward
