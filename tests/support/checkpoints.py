"""Small random checkpoints in the real Hugging Face layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MASK, EOS, EOT, BOS = 500, 501, 502, 503

#: Renders what GSAI-ML/LLaDA-8B-Instruct's template renders.
LLADA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)


def llada_config(**overrides: Any) -> dict[str, Any]:
    """config.json of a tiny LLaDA: 2 layers, GQA 4/2, vocabulary 512."""
    config: dict[str, Any] = {
        "architectures": ["LLaDAModelLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_type": "llama",
        "d_model": 64,
        "embedding_size": 512,
        "eos_token_id": EOS,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": MASK,
        "max_sequence_length": 256,
        "mlp_hidden_size": 96,
        "mlp_ratio": 4,
        "model_type": "llada",
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "pad_token_id": EOS,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 10000.0,
        "scale_logits": False,
        "vocab_size": 512,
        "weight_tying": False,
    }
    return config | overrides


def llada_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a LLaDA checkpoint (facts of the real index file)."""
    d, mlp, vocab = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv = d // config["n_heads"] * config["n_kv_heads"]
    root = "model.transformer"
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}.wte.weight": (vocab, d),
        f"{root}.ln_f.weight": (d,),
    }
    if not config["weight_tying"]:
        shapes[f"{root}.ff_out.weight"] = (vocab, d)
    for i in range(config["n_layers"]):
        block = f"{root}.blocks.{i}"
        shapes |= {
            f"{block}.attn_norm.weight": (d,),
            f"{block}.ff_norm.weight": (d,),
            f"{block}.q_proj.weight": (d, d),
            f"{block}.k_proj.weight": (kv, d),
            f"{block}.v_proj.weight": (kv, d),
            f"{block}.attn_out.weight": (d, d),
            f"{block}.ff_proj.weight": (mlp, d),
            f"{block}.up_proj.weight": (mlp, d),
            f"{block}.ff_out.weight": (d, mlp),
        }
    return shapes


def random_tensors(
    shapes: dict[str, tuple[int, ...]], *, seed: int = 1, scale: float = 0.25
) -> dict[str, torch.Tensor]:
    """Random weights; norms around one. `scale` is large enough for peaked predictions."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if len(shape) == 1 else scale * noise
    return tensors


def write_llada(
    directory: Path,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    chat_template: bool = True,
    seed: int = 1,
    **overrides: Any,
) -> Path:
    """Write a tiny random LLaDA checkpoint to `directory` and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = llada_config(**overrides)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    tensors = {k: v.to(dtype) for k, v in random_tensors(llada_shapes(config), seed=seed).items()}
    write_tensors(directory, tensors, shards)
    if tokenizer:
        write_tokenizer(directory, chat_template=chat_template)
    return directory


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """One safetensors file, or several and their index."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(directory: Path, *, chat_template: bool = True) -> None:
    """A byte-level tokenizer: ids 0..255 are bytes, LLaDA's special tokens from 500 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<unused{i}>" for i in range(500 - len(alphabet))]
    vocab = {token: i for i, token in enumerate([*alphabet, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [
        "mdm_mask",
        "endoftext",
        "eot_id",
        "startoftext",
        "start_header_id",
        "end_header_id",
    ]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    if chat_template:
        settings["chat_template"] = LLADA_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
