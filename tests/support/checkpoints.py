"""Small random checkpoints in the real Hugging Face layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MASK, EOS, EOT, BOS = 500, 501, 502, 503

#: Renders the same as GSAI-ML/LLaDA-8B-Instruct's template.
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
    """Random weights; norms around one. `scale` is large enough for confident predictions."""
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
    scale: float = 0.25,
    **overrides: Any,
) -> Path:
    """Write a tiny random LLaDA checkpoint to `directory` and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = llada_config(**overrides)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    tensors = random_tensors(llada_shapes(config), seed=seed, scale=scale)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
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


#: LLaDA's special tokens, in the order of their ids; here without gaps.
LLADA_SPECIALS = {
    "<|mdm_mask|>": MASK,
    "<|endoftext|>": EOS,
    "<|eot_id|>": EOT,
    "<|startoftext|>": BOS,
    "<|start_header_id|>": 504,
    "<|end_header_id|>": 505,
}


def byte_vocabulary(size: int) -> dict[str, int]:
    """The 256 bytes, and unused words up to `size`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<unused{i}>" for i in range(size - len(alphabet))]
    return {token: i for i, token in enumerate([*alphabet, *fillers])}


def write_tokenizer(
    directory: Path, *, chat_template: bool = True, specials: Mapping[str, int] = LLADA_SPECIALS
) -> None:
    """A byte-level tokenizer: ids 0..255 are bytes, then fillers up to the special tokens."""
    first = min(specials.values())
    vocab = byte_vocabulary(first)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {i: name for name, i in specials.items()}
    tokenizer.add_special_tokens(
        [
            AddedToken(names.get(i, f"<|reserved_token_{i - first}|>"), special=True)
            for i in range(first, max(names) + 1)
        ]
    )
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


#: Renders the same as Qwen2.5's template for plain messages.
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DREAM_SPECIALS = {
    "<|endoftext|>": 500,
    "<|im_start|>": 501,
    "<|im_end|>": 502,
    "<|beginoftext|>": 503,
    "<|mask|>": 504,
}
DREAM_MASK = DREAM_SPECIALS["<|mask|>"]


def dream_config(**overrides: Any) -> dict[str, Any]:
    """config.json of a tiny Dream: 2 layers, GQA 4/2, vocabulary 512."""
    config: dict[str, Any] = {
        "architectures": ["DreamModel"],
        "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        "bos_token_id": 500,
        "eos_token_id": 500,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "mask_token_id": DREAM_MASK,
        "max_position_embeddings": 256,
        "model_type": "Dream",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 512,
    }
    return config | overrides


def dream_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a Dream checkpoint: Qwen2's."""
    d, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, d),
        "model.norm.weight": (d,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, size in {"q": d, "k": kv, "v": kv}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, d)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes |= {
            f"{layer}.input_layernorm.weight": (d,),
            f"{layer}.post_attention_layernorm.weight": (d,),
            f"{layer}.self_attn.o_proj.weight": (d, d),
            f"{layer}.mlp.gate_proj.weight": (mlp, d),
            f"{layer}.mlp.up_proj.weight": (mlp, d),
            f"{layer}.mlp.down_proj.weight": (d, mlp),
        }
    return shapes


def write_dream(
    directory: Path,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    seed: int = 1,
    scale: float = 0.25,
    **overrides: Any,
) -> Path:
    """Write a tiny random Dream checkpoint to `directory` and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = dream_config(**overrides)
    (directory / "config.json").write_text(json.dumps(config))
    generation = {"alg": "origin", "eos_token_id": 500, "mask_token_id": None, "steps": 512}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tensors = random_tensors(dream_shapes(config), seed=seed, scale=scale)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_tensors(directory, tensors, shards)
    if tokenizer:
        write_dream_tokenizer(directory)
    return directory


def write_dream_tokenizer(directory: Path, *, specials: Mapping[str, int] = DREAM_SPECIALS) -> None:
    """Dream's files: vocab.json, merges.txt, and a tokenizer class of its remote code."""
    vocab = byte_vocabulary(min(specials.values()))
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "added_tokens.json").write_text(json.dumps(specials))
    added = {
        str(i): {"content": token, "special": True, "lstrip": False, "rstrip": False,
                 "normalized": False, "single_word": False}
        for token, i in specials.items()
    }  # fmt: skip
    settings = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": QWEN_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "tokenizer_class": "DreamTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
