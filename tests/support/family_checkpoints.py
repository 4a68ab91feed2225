"""Small random checkpoints of the families with Hugging Face's names, in their real layouts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .checkpoints import QWEN_TEMPLATE, byte_vocabulary, random_tensors, write_tensors

#: Tiny sizes; a head is wider than hidden_size / heads, as in Qwen3-4B.
_TINY: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
}
#: Renders the same as Qwen3's template for plain messages: earlier thoughts are dropped.
QWEN3_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
#: ChatML with an empty system turn if there is none; the answer begins behind empty thoughts.
NEMOTRON_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think></think>' }}{% endif %}"
)
#: A plain template: that of iLLaDA has not been seen.
ILLADA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What makes a family's files."""

    config: Mapping[str, Any]
    #: Special tokens of the tiny checkpoint, and of the published ones.
    specials: Mapping[str, int]
    published: Mapping[str, int]
    mask: str
    template: str
    #: Entries of tokenizer_config.json.
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]
    #: Beginning of the backbone's names, and the head's name.
    root: str = "model"
    head: str = "lm_head.weight"
    #: Whether its tokenizer is vocab.json and merges.txt, as Qwen's.
    qwen_files: bool = True


FAMILIES: dict[str, Family] = {
    "sdar": Family(
        config=_TINY
        | {
            "architectures": ["SDARForCausalLM"],
            "attention_bias": False,
            "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
            "block_size": 4,
            "eos_token_id": 500,
            "head_dim": 24,
            "mask_token_id": 505,
            "model_type": "sdar",
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
        },
        specials={
            "<|endoftext|>": 500,
            "<|im_start|>": 501,
            "<|im_end|>": 502,
            "<think>": 503,
            "</think>": 504,
            "<|MASK|>": 505,
        },
        published={
            "<|endoftext|>": 151643,
            "<|im_start|>": 151644,
            "<|im_end|>": 151645,
            "<think>": 151667,
            "</think>": 151668,
            "<|MASK|>": 151669,
        },
        mask="<|MASK|>",
        template=QWEN3_TEMPLATE,
        tokenizer={
            "auto_map": {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]},
            "bos_token": None,
            "mask_token": "<|MASK|>",
            "tokenizer_class": "Qwen2Tokenizer",
        },
        generation={"eos_token_id": [502, 500], "do_sample": True, "temperature": 0.6},
    ),
    "fast_dllm": Family(
        config=_TINY
        | {
            "architectures": ["Fast_dLLM_QwenForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM"},
            "bd_size": 32,
            "conplemenrary_mask": True,
            "eos_token_id": 502,
            "layer_types": ["full_attention"] * 2,
            "model_type": "Fast_dLLM_Qwen",
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
        },
        specials={
            "<|endoftext|>": 500,
            "<|im_start|>": 501,
            "<|im_end|>": 502,
            "|<MASK>|": 503,
        },
        published={
            "<|endoftext|>": 151643,
            "<|im_start|>": 151644,
            "<|im_end|>": 151645,
            "|<MASK>|": 151665,
        },
        mask="|<MASK>|",
        template=QWEN_TEMPLATE,
        tokenizer={"bos_token": None, "tokenizer_class": "Qwen2Tokenizer"},
        generation={"eos_token_id": [502, 500]},
    ),
    "nemotron": Family(
        config=_TINY
        | {
            "architectures": ["NemotronLabsDiffusionModel"],
            "attention_bias": False,
            "block_size": 8,
            "bos_token_id": 1,
            "dlm_paradigm": "bidirectional",
            "eos_token_id": 11,
            "head_dim": 24,
            "mask_token_id": 100,
            "mlp_bias": False,
            "model_type": "nemotron_labs_diffusion",
            "rms_norm_eps": 1e-5,
            # Small numbers, so that short sequences feel all of them.
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
                "rope_type": "yarn",
            },
            "sliding_window": None,
        },
        specials={
            "<s>": 1,
            "</s>": 2,
            "<|im_start|>": 10,
            "<|im_end|>": 11,
            "<think>": 12,
            "</think>": 13,
            "<SPECIAL_100>": 100,
        },
        published={
            "<s>": 1,
            "</s>": 2,
            "<|im_start|>": 10,
            "<|im_end|>": 11,
            "<think>": 12,
            "</think>": 13,
            "<SPECIAL_100>": 100,
        },
        mask="<SPECIAL_100>",
        template=NEMOTRON_TEMPLATE,
        tokenizer={"bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"},
        generation={"eos_token_id": 11},
        root="encoder",
        head="diffusion_head.weight",
        qwen_files=False,
    ),
    "illada": Family(
        config=_TINY
        | {
            "architectures": ["ILLaDAForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "mlp_bias": False,
            "model_type": "illada",
            "pad_token_id": 1,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        specials={"<s>": 0, "<pad>": 1, "</s>": 2, "<[MASK]>": 5},
        published={"<s>": 0, "<pad>": 1, "</s>": 2, "<[MASK]>": 5},
        mask="<[MASK]>",
        template=ILLADA_TEMPLATE,
        tokenizer={"bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"},
        generation={"eos_token_id": 2},
        qwen_files=False,
    ),
}


def mask_of(family: str) -> int:
    """The mask token of a family's tiny checkpoint."""
    found = FAMILIES[family]
    return found.specials[found.mask]


def shapes(family: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a family's checkpoint with this config."""
    made = FAMILIES[family]
    d, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    found: dict[str, tuple[int, ...]] = {
        f"{made.root}.embed_tokens.weight": (vocab, d),
        f"{made.root}.norm.weight": (d,),
    }
    if not config["tie_word_embeddings"]:
        found[made.head] = (vocab, d)
    maps = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (mlp, d),
        "mlp.up_proj": (mlp, d),
        "mlp.down_proj": (d, mlp),
    }
    with_bias = {name for name in maps if config.get("attention_bias") and "self_attn" in name}
    with_bias |= {name for name in maps if config.get("mlp_bias") and "mlp" in name}
    if family == "fast_dllm":
        with_bias |= {f"self_attn.{x}_proj" for x in "qkv"}
    for i in range(config["num_hidden_layers"]):
        layer = f"{made.root}.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = (d,)
        found[f"{layer}.post_attention_layernorm.weight"] = (d,)
        for name, shape in maps.items():
            found[f"{layer}.{name}.weight"] = shape
            if name in with_bias:
                found[f"{layer}.{name}.bias"] = shape[:1]
        if family == "sdar":
            found |= {f"{layer}.self_attn.{x}_norm.weight": (width,) for x in "qk"}
    return found


def write_family(
    directory: Path,
    family: str,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    seed: int = 1,
    scale: float = 0.25,
    **overrides: Any,
) -> Path:
    """Write a tiny random checkpoint of a family to `directory` and return it."""
    made = FAMILIES[family]
    directory.mkdir(parents=True, exist_ok=True)
    config = {**made.config, **overrides}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(dict(made.generation)))
    tensors = random_tensors(shapes(family, config), seed=seed, scale=scale)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_tensors(directory, tensors, shards)
    if tokenizer:
        write_family_tokenizer(directory, family, made.specials)
    return directory


def write_family_tokenizer(directory: Path, family: str, specials: Mapping[str, int]) -> None:
    """A byte-level tokenizer in the family's files, with these special tokens."""
    made = FAMILIES[family]
    first = min(specials.values()) if made.qwen_files else 0
    names = {i: name for name, i in specials.items()}
    # Published tokenizers have no gaps.
    specials = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(first, max(names) + 1)}
    settings: dict[str, Any] = {
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True, "lstrip": False, "rstrip": False,
                     "normalized": False, "single_word": False}
            for token, i in specials.items()
        },
        "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>" if "<pad>" in specials else next(iter(specials)),
        **made.tokenizer,
    }  # fmt: skip
    if "<|im_end|>" in specials:
        settings["eos_token"] = "<|im_end|>"
    if "</s>" in specials:
        settings["eos_token"] = "</s>"
    write = _write_qwen_files if made.qwen_files else _write_tokenizer_json
    write(directory, specials)
    (directory / "chat_template.jinja").write_text(made.template)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_qwen_files(directory: Path, specials: Mapping[str, int]) -> None:
    """The special tokens behind the vocabulary; SDAR's file spells its mask in another way."""
    vocab = byte_vocabulary(min(specials.values()))
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    added = {("<MASK>" if token == "<|MASK|>" else token): i for token, i in specials.items()}
    (directory / "added_tokens.json").write_text(json.dumps(added))


def _write_tokenizer_json(directory: Path, specials: Mapping[str, int]) -> None:
    """The special tokens before the vocabulary, with placeholders between them."""
    special = list(specials)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
