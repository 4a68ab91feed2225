"""Computes a checkpoint's logits with transformers' own Llama and Qwen2 classes, as an oracle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.ministral3.modeling_ministral3 import Ministral3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from .reference import Forward

_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_NORMS = (LlamaRMSNorm, Ministral3RMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
_OUTSIDE = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}


def llada_oracle(directory: Path, dtype: torch.dtype) -> Forward:
    """Logits [length, vocab] of one sequence, by a bidirectional `LlamaForCausalLM`."""
    config = json.loads((directory / "config.json").read_text())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["embedding_size"],
            hidden_size=config["d_model"],
            intermediate_size=config["mlp_hidden_size"],
            num_hidden_layers=config["n_layers"],
            num_attention_heads=config["n_heads"],
            num_key_value_heads=config["n_kv_heads"],
            max_position_embeddings=config["max_sequence_length"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            tie_word_embeddings=config["weight_tying"],
        )
    )
    model.load_state_dict(checkpoint_tensors(directory), strict=True)
    return _bidirectional(model, dtype)


def dream_oracle(directory: Path, dtype: torch.dtype) -> Forward:
    """Logits [length, vocab] of one sequence, shifted as in Dream, by `Qwen2ForCausalLM`."""
    config = json.loads((directory / "config.json").read_text())
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings"
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **{key: config[key] for key in keys.split()},
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        )
    )
    model.load_state_dict(checkpoint_tensors(directory), strict=True)
    unshifted = _bidirectional(model, dtype)

    def forward(tokens: Tensor) -> Tensor:
        logits = unshifted(tokens)
        return torch.cat([logits[:1], logits[:-1]])

    return forward


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """Shape of a checkpoint, from its family's field names."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    rms_norm_eps: float
    rope_theta: float
    shifted: bool


def checkpoint_config(directory: Path) -> PlainConfig:
    """Read config.json of a LLaDA or Dream checkpoint."""
    config = json.loads((directory / "config.json").read_text())
    dream = config["architectures"] == ["DreamModel"]
    names = {
        "num_layers": ("n_layers", "num_hidden_layers"),
        "num_heads": ("n_heads", "num_attention_heads"),
        "num_kv_heads": ("n_kv_heads", "num_key_value_heads"),
        "hidden_size": ("d_model", "hidden_size"),
        "rms_norm_eps": ("rms_norm_eps", "rms_norm_eps"),
        "rope_theta": ("rope_theta", "rope_theta"),
    }
    return PlainConfig(**{k: config[pair[dream]] for k, pair in names.items()}, shifted=dream)


def checkpoint_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a LLaDA or Dream checkpoint, under Llama's names."""
    tensors = read_tensors(directory)
    if "model.transformer.wte.weight" in tensors:
        tensors = {_llama_name(name): tensor for name, tensor in tensors.items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return tensors


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, under its own names."""
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def _bidirectional(model: nn.Module, dtype: torch.dtype) -> Forward:
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        widen_norms(model)

    @torch.inference_mode()
    def forward(tokens: Tensor) -> Tensor:
        everything = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool)
        logits: Tensor = model(tokens[None], attention_mask=everything).logits[0]
        return logits

    return forward


def widen_norms(model: nn.Module) -> None:
    """Keep norms in float64; the classes' own norms round to float32."""
    for module in model.modules():
        if isinstance(module, _NORMS):

            def norm(x: Tensor, module: Any = module) -> Tensor:
                scale = (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
                scaled: Tensor = module.weight * x * scale
                return scaled

            module.forward = norm


def _llama_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, _, index, part, kind = name.split(".")
    return f"model.layers.{index}.{_IN_BLOCK[part]}.{kind}"
