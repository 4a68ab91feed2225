"""Sizes, special tokens and tensor names of the published checkpoints' configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dllm_engine.models import dream, llada
from dllm_engine.models.base import ModelSpec
from dllm_engine.models.loader import read_spec
from dllm_engine.ops.rotary import Rope
from dllm_engine.tokenizer import Tokenizer

from tests.support.checkpoints import DREAM_MASK, DREAM_SPECIALS, write_dream

#: GSAI-ML/LLaDA-8B-Instruct, config.json, every field; Base and 1.5 have the same.
LLADA_8B: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
#: Dream-org/Dream-v0-Instruct-7B, likewise.
DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLADA_GENERATION = {"bos_token_id": 126080, "eos_token_id": 126081}
DREAM_GENERATION = {
    "alg": "origin",
    "alg_temp": None,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "eps": 0.001,
    "mask_token_id": None,
    "output_history": False,
    "pad_token_id": 151643,
    "steps": 512,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
}


def read(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> ModelSpec:
    """Read the spec of a directory with these two files."""
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").touch()
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_spec(directory)


@pytest.mark.parametrize("generation", [LLADA_GENERATION, None, {"eos_token_id": None}], ids=str)
def test_llada_8b_has_its_published_size(tmp_path: Path, generation: dict[str, Any] | None) -> None:
    """LLaDA Base, Instruct and 1.5 have 8,015,581,184 parameters in 291 tensors."""
    spec = read(tmp_path, LLADA_8B, generation)
    assert spec.weight_bytes(1) == 8_015_581_184
    names = [name for sources in llada.tensors(spec).values() for name in sources]
    assert len(names) == len(set(names)) == 291
    assert (spec.mask_token_id, spec.eos_token_ids) == (126336, (126081,))
    assert (spec.head_dim, spec.max_model_len, spec.shifted) == (128, 4096, False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bos_token_id": 151665},
        {"dtype": "bfloat16", "torch_dtype": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None},
    ],
    ids=["Dream-v0", "Dream-Coder", "saved again", "saved by transformers 5"],
)
def test_dream_7b_and_what_shares_its_format_have_the_published_size(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Dream, Dream-Coder and DiffuCoder have 7,615,616,512 parameters in 339 tensors."""
    config = {k: v for k, v in (DREAM_7B | changes).items() if v is not None}
    spec = read(tmp_path, config, DREAM_GENERATION)
    assert spec.weight_bytes(1) == 7_615_616_512
    names = [name for sources in dream.tensors(spec).values() for name in sources]
    assert len(names) == len(set(names)) == 339
    assert (spec.mask_token_id, spec.eos_token_ids) == (151666, (151643,))
    assert (spec.head_dim, spec.max_model_len, spec.shifted) == (128, 2048, True)
    assert spec.rope == Rope(theta=1e6)


def test_ends_of_a_turn_are_those_of_all_files(tmp_path: Path) -> None:
    """Stop tokens come from both configs and from the tokenizer, and `eos_token_id` may be a
    list."""
    write_dream(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    padding = settings["added_tokens_decoder"]["500"] | {"content": "<|dlm_pad|>"}
    settings["added_tokens_decoder"]["505"] = padding
    settings["pad_token"] = "<|dlm_pad|>"
    settings_file.write_text(json.dumps(settings))
    added = DREAM_SPECIALS | {"<|dlm_pad|>": 505}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.load(tmp_path, DREAM_MASK)
    assert tokenizer is not None
    assert set(tokenizer.stop_token_ids) == {500, 502, 505}
    spec = read(tmp_path, DREAM_7B, DREAM_GENERATION | {"eos_token_id": [151643, 151645]})
    assert spec.eos_token_ids == (151643, 151645)
