"""Reads and writes the demo's two checkpoint layouts: tokenizer, config.json, tensor names.

Training runs on transformers' native Llama and Qwen2 classes, which compute the same as LLaDA and
Dream; only the names on disk differ.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

Family = Literal["llada", "dream"]


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


@dataclass(frozen=True, slots=True)
class Specials:
    """The special tokens of a family, in the order of their ids after the vocabulary."""

    names: tuple[str, ...]
    bos: str
    eos: str
    mask: str


SPECIALS: dict[Family, Specials] = {
    "llada": Specials(
        names=(
            "<|startoftext|>",
            "<|endoftext|>",
            "<|mdm_mask|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        bos="<|startoftext|>",
        eos="<|endoftext|>",
        mask="<|mdm_mask|>",
    ),
    "dream": Specials(
        names=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
        bos="<|beginoftext|>",
        eos="<|endoftext|>",
        mask="<|mask|>",
    ),
}

# LLaDA's template always adds the answer's header; Dream's adds a system turn if there is none.
CHAT_TEMPLATES: dict[Family, str] = {
    "llada": (
        "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "dream": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}

# The split of Qwen2's tokenizer: words keep their leading space, digits stand alone.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_ids(family: Family, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the family's special tokens, by name."""
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return {name: vocabulary[name] for name in SPECIALS[family].names}


def chat_prompt(family: Family, question: str) -> str:
    """The chat template's text for one user message."""
    if family == "llada":
        return (
            f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{question.strip()}"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        )
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def build_tokenizer(family: Family, texts: list[str], size: int) -> Tokenizer:
    """Train a byte-level BPE of `size` entries, the family's special tokens last."""
    specials = SPECIALS[family]
    tokenizer = Tokenizer(models.BPE())
    if family == "dream":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(specials.names),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The template's words must be single tokens, whatever the corpus contains.
    frame = ["user\n\n", "assistant\n\n", "system\n\n"] * 2000
    if family == "dream":
        frame += ["You are a helpful assistant."] * 2000
    tokenizer.train_from_iterator([*texts, *frame], trainer)
    tokenizer.add_special_tokens(list(specials.names))
    return tokenizer


def build_model(family: Family, shape: Shape, vocab: int) -> torch.nn.Module:
    """A freshly initialised bidirectional model of the family."""
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
    else:
        model = Qwen2ForCausalLM(Qwen2Config(rms_norm_eps=1e-6, **common))
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
    if family == "dream":
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
        "architectures": ["LLaDAModelLM"],
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
        "architectures": ["DreamModel"],
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


def _generation_config(family: Family, ids: Mapping[str, int]) -> dict[str, Any]:
    specials = SPECIALS[family]
    if family == "llada":
        return {"bos_token_id": ids[specials.bos], "eos_token_id": ids[specials.eos]}
    end = ids[specials.eos]
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
        "bos_token": specials.bos,
        "chat_template": CHAT_TEMPLATES[family],
        "clean_up_tokenization_spaces": False,
        "eos_token": specials.eos,
        "model_max_length": shape.max_length,
        "pad_token": specials.eos,
    }
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
    named = {"bos_token": specials.bos, "eos_token": specials.eos, "pad_token": specials.eos}
    if family == "dream":
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
    config = _llada_config if family == "llada" else _dream_config
    _write_json(out / "config.json", config(shape, vocab, ids))
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
    return Shape(hidden, layers, heads, kv_heads, mlp, length, float(config["rope_theta"]))


def load(path: Path) -> tuple[Family, torch.nn.Module, Mapping[str, Any]]:
    """Read a checkpoint directory into its native class, in float32; every tensor must match."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    family: Family = "llada" if config["architectures"][0] == "LLaDAModelLM" else "dream"
    model = build_model(family, _read_shape(family, config), int(config["vocab_size"]))
    stored = load_file(path / "model.safetensors")
    native = {name: stored.pop(disk_name(family, name)).float() for name in model.state_dict()}
    if stored:
        raise ValueError(f"{path} has unused tensors: {sorted(stored)}")
    model.load_state_dict(native)
    return family, model.eval(), config


def _head_means(weight: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Merge key or value heads by their mean (Ainslie et al. 2023, GQA, 2.1)."""
    split = weight.unflatten(0, (kv_heads, heads // kv_heads, -1))  # type: ignore[no-untyped-call]
    merged: torch.Tensor = split.mean(1).flatten(0, 1)
    return merged


# Names of a family's special tokens in the other family.
_SAME_TOKEN = {
    "<|im_start|>": "<|start_header_id|>",
    "<|im_end|>": "<|eot_id|>",
    "<|beginoftext|>": "<|startoftext|>",
    "<|mask|>": "<|mdm_mask|>",
}


def transplant(source: Path, model: torch.nn.Module, tokenizer: Tokenizer, shape: Shape) -> None:
    """Copy the weights that `model` shares with the LLaDA checkpoint in `source`.

    Tokens are matched by their text; rows of tokens missing in the source stay unchanged.
    """
    _, donor, config = load(source)
    given = donor.state_dict()
    known: dict[str, int] = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    pairs = [
        (place, known[_SAME_TOKEN.get(token, token)])
        for token, place in tokenizer.get_vocab().items()
        if _SAME_TOKEN.get(token, token) in known
    ]
    to, origin = (torch.tensor(column) for column in zip(*pairs, strict=True))
    state = model.state_dict()
    for name, weight in given.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name][to] = weight[origin]
        elif ".k_proj." in name or ".v_proj." in name:
            state[name].copy_(_head_means(weight, int(config["n_heads"]), shape.kv_heads))
        else:
            state[name].copy_(weight)


def shape_fields(shape: Shape) -> dict[str, Any]:
    """The shape as plain data, for a training state."""
    return asdict(shape)
