"""Reads and writes the demo's three checkpoint layouts: tokenizer, config.json, tensor names.

Training runs on transformers' native Llama, Qwen2 and Qwen3 classes, which compute the same as
LLaDA, Dream and SDAR; only LLaDA's names on disk differ.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from demo.chat import CHAT_TEMPLATES, FILL, SPECIALS, Family, special_ids

#: SDAR's block: rows of a block see the blocks before it and the whole of their own.
SDAR_BLOCK = 16
ARCHITECTURES: dict[Family, str] = {
    "llada": "LLaDAModelLM",
    "dream": "DreamModel",
    "sdar": "SDARForCausalLM",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a demo model."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 352
    max_length: int = 512
    rope_theta: float = 10000.0
    head: int = 32


def build_model(family: Family, shape: Shape, vocab: int) -> torch.nn.Module:
    """A freshly initialised model of the family, bidirectional if it is given no mask."""
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    model: torch.nn.Module
    if family == "llada":
        model = LlamaForCausalLM(LlamaConfig(rms_norm_eps=1e-5, **common))
    elif family == "dream":
        model = Qwen2ForCausalLM(Qwen2Config(rms_norm_eps=1e-6, **common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(rms_norm_eps=1e-6, head_dim=shape.head, **common))
    # The classes default to causal attention, which masks every later position.
    cast(Any, model).config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            cast(Any, module).is_causal = False
    return model


_LLADA_BLOCK = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
_LLADA_OUTER = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}


def disk_name(family: Family, name: str) -> str:
    """The name of a native class's tensor in the family's checkpoint."""
    if family != "llada":
        return name
    if name in _LLADA_OUTER:
        return _LLADA_OUTER[name]
    _, _, index, part = name.split(".", 3)
    return f"model.transformer.blocks.{index}.{_LLADA_BLOCK[part.removesuffix('.weight')]}.weight"


def _llada_config(shape: Shape, vocab: int, ids: Mapping[str, int]) -> dict[str, Any]:
    specials = SPECIALS["llada"]
    return {
        "activation_type": "silu",
        "alibi": False,
        "architectures": [ARCHITECTURES["llada"]],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": shape.hidden,
        "embedding_dropout": 0.0,
        "embedding_size": vocab,
        "eos_token_id": ids[specials.eos],
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": ids[specials.mask],
        "max_sequence_length": shape.max_length,
        "mlp_hidden_size": shape.mlp,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "n_layers": shape.layers,
        "pad_token_id": ids[specials.eos],
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": shape.rope_theta,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": vocab,
        "weight_tying": False,
    }


def _dream_config(shape: Shape, vocab: int, ids: Mapping[str, int]) -> dict[str, Any]:
    specials = SPECIALS["dream"]
    return {
        "architectures": [ARCHITECTURES["dream"]],
        "attention_dropout": 0.0,
        "bos_token_id": ids[specials.eos],
        "eos_token_id": ids[specials.eos],
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp,
        "mask_token_id": ids[specials.mask],
        "max_position_embeddings": shape.max_length,
        "max_window_layers": shape.layers,
        "model_type": "Dream",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": ids[specials.eos],
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }


def _sdar_config(shape: Shape, vocab: int, ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES["sdar"]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": SDAR_BLOCK,
        "bos_token_id": ids[FILL],
        "eos_token_id": ids[FILL],
        "head_dim": shape.head,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp,
        "mask_token_id": ids[SPECIALS["sdar"].mask],
        "max_position_embeddings": shape.max_length,
        "max_window_layers": shape.layers,
        "model_type": "sdar",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }


_CONFIGS = {"llada": _llada_config, "dream": _dream_config, "sdar": _sdar_config}


def _generation_config(family: Family, ids: Mapping[str, int]) -> dict[str, Any]:
    specials = SPECIALS[family]
    if family == "llada":
        return {"bos_token_id": ids[specials.bos], "eos_token_id": ids[specials.eos]}
    end = ids[specials.eos]
    if family == "sdar":
        return {"eos_token_id": [end, ids[FILL]], "pad_token_id": ids[FILL]}
    return {
        "alg": "origin",
        "alg_temp": None,
        "bos_token_id": end,
        "eos_token_id": end,
        "eps": 0.001,
        "mask_token_id": None,
        "output_history": False,
        "pad_token_id": end,
        "steps": 512,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
    }


def _tokenizer_config(family: Family, shape: Shape, ids: Mapping[str, int]) -> dict[str, Any]:
    specials = SPECIALS[family]
    added = {
        str(ids[name]): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for name in specials.names
    }
    fields: dict[str, Any] = {
        "add_bos_token": False,
        "added_tokens_decoder": added,
        "bos_token": None if family == "sdar" else specials.bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": FILL,
        "model_max_length": shape.max_length,
        "pad_token": FILL,
    }
    if family == "sdar":
        # Its template is a file of its own.
        return fields | {"mask_token": specials.mask, "tokenizer_class": "Qwen2Tokenizer"}
    fields["chat_template"] = CHAT_TEMPLATES[family]
    if family == "llada":
        # As in LLaDA, the mask is an added token but not the tokenizer's mask_token.
        return fields | {
            "add_eos_token": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
    return fields | {"mask_token": specials.mask, "tokenizer_class": "DreamTokenizer"}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _export_tokenizer(family: Family, tokenizer: Tokenizer, shape: Shape, out: Path) -> None:
    specials = SPECIALS[family]
    ids = special_ids(family, tokenizer)
    if family == "llada":
        tokenizer.save(str(out / "tokenizer.json"))
    else:
        tokenizer.model.save(str(out))
        _write_json(out / "added_tokens.json", ids)
    _write_json(out / "tokenizer_config.json", _tokenizer_config(family, shape, ids))
    named = {"bos_token": specials.bos, "eos_token": FILL, "pad_token": FILL}
    if family == "sdar":
        del named["bos_token"]
        (out / "chat_template.jinja").write_text(CHAT_TEMPLATES[family], encoding="utf-8")
    if family != "llada":
        named["mask_token"] = specials.mask
    _write_json(out / "special_tokens_map.json", named)


def export(
    family: Family,
    weights: Mapping[str, torch.Tensor],
    tokenizer: Tokenizer,
    shape: Shape,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a checkpoint directory in the family's layout."""
    out.mkdir(parents=True, exist_ok=True)
    ids = special_ids(family, tokenizer)
    vocab = tokenizer.get_vocab_size()
    _write_json(out / "config.json", _CONFIGS[family](shape, vocab, ids))
    _write_json(out / "generation_config.json", _generation_config(family, ids))
    _export_tokenizer(family, tokenizer, shape, out)
    tensors = {disk_name(family, k): v.detach().to(dtype).contiguous() for k, v in weights.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # The library makes files readable by the owner only; a server may run as another user.
    (out / "model.safetensors").chmod(0o644)


def _read_shape(family: Family, config: Mapping[str, Any]) -> Shape:
    keys = (
        ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "max_sequence_length")
        if family == "llada"
        else (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
    )
    hidden, layers, heads, kv_heads, mlp, length = (int(config[key]) for key in keys)
    head = int(config.get("head_dim", hidden // heads))
    return Shape(hidden, layers, heads, kv_heads, mlp, length, float(config["rope_theta"]), head)


def load(path: Path) -> tuple[Family, torch.nn.Module, Mapping[str, Any]]:
    """Read a checkpoint directory into its native class, in float32; every tensor must match."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    family = next(f for f, name in ARCHITECTURES.items() if name == config["architectures"][0])
    model = build_model(family, _read_shape(family, config), int(config["vocab_size"]))
    stored = load_file(path / "model.safetensors")
    native = {name: stored.pop(disk_name(family, name)).float() for name in model.state_dict()}
    if stored:
        raise ValueError(f"{path} has unused tensors: {sorted(stored)}")
    model.load_state_dict(native)
    return family, model.eval(), config


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a demo checkpoint."""
    if (path / "tokenizer.json").exists():
        return Tokenizer.from_file(str(path / "tokenizer.json"))
    stored: Tokenizer = Qwen2Tokenizer.from_pretrained(path).backend_tokenizer
    return stored


def shape_fields(shape: Shape) -> dict[str, Any]:
    """The shape as plain data, for a training state."""
    return asdict(shape)
