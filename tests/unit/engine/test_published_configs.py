"""Sizes, special tokens and tensor names of the published checkpoints' configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dllm_engine.models import dream, fast_dllm, illada, llada, nemotron, sdar
from dllm_engine.models.base import BlockAttention, ModelSpec
from dllm_engine.models.loader import read_spec
from dllm_engine.ops.rotary import QueryScaling, Rope, Yarn
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
#: JetLM/SDAR-4B-Chat, likewise; copies also lack `block_size` and `mask_token_id`.
SDAR_4B: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "block_size": 4,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "mask_token_id": 151669,
    "max_position_embeddings": 32768,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
#: Efficient-Large-Model/Fast_dLLM_v2_7B, the fields that the engine reads.
FAST_DLLM_7B: dict[str, Any] = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "bd_size": 32,
    "bos_token_id": 151643,
    "conplemenrary_mask": True,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "Fast_dLLM_Qwen",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151645,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
#: nvidia/Nemotron-Labs-Diffusion-3B-Base, likewise.
NEMOTRON_3B: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "ar_loss_weight": 1.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "sdpa",
    "block_size": 32,
    "bos_token_id": 1,
    "dlm_loss_weight": None,
    "dlm_paradigm": "bidirectional",
    "dp_varying_mask_ratio": False,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "mask_token_id": 100,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "nemotron_labs_diffusion",
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 0.25,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
    },
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "vocab_size": 131072,
}
#: GSAI-ML/iLLaDA-8B-Instruct, as its remote code and the catalogue tell: the file was not seen.
ILLADA_8B: dict[str, Any] = {
    "architectures": ["ILLaDAForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "illada",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 155136,
}
QWEN_GENERATION = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
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


@pytest.mark.parametrize(
    "generation",
    [LLADA_GENERATION, None, {"eos_token_id": None}],
    ids=["LLaDA", "dParallel_LLaDA", "d3LLM_LLaDA"],
)
def test_llada_8b_has_its_published_size(tmp_path: Path, generation: dict[str, Any] | None) -> None:
    """LLaDA Base, Instruct and 1.5, and dParallel and d3LLM with the same files, have 8,015,581,184
    parameters in 291 tensors."""
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
        {"pad_token_id": 151643},
        {"dtype": "bfloat16", "torch_dtype": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None},
    ],
    ids=[
        "Dream-v0, dParallel, d3LLM",
        "Dream-Coder, d3LLM",
        "DiffuCoder",
        "saved again",
        "saved by transformers 5",
    ],
)
def test_dream_7b_and_what_shares_its_format_have_the_published_size(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Dream, and what has its files (dParallel, d3LLM, Dream-Coder, DiffuCoder), have 7,615,616,512
    parameters in 339 tensors."""
    config = {k: v for k, v in (DREAM_7B | changes).items() if v is not None}
    spec = read(tmp_path, config, DREAM_GENERATION)
    assert spec.weight_bytes(1) == 7_615_616_512
    names = [name for sources in dream.tensors(spec).values() for name in sources]
    assert len(names) == len(set(names)) == 339
    assert (spec.mask_token_id, spec.eos_token_ids) == (151666, (151643,))
    assert (spec.head_dim, spec.max_model_len, spec.shifted) == (128, 2048, True)
    assert spec.rope == Rope(theta=1e6)


def names_of(family: Any, spec: ModelSpec) -> list[str]:
    """The checkpoint tensors that a model is made of."""
    return [name for sources in family.tensors(spec).values() for name in sources]


@pytest.mark.parametrize(
    ("changes", "parameters", "tensors"),
    [
        (
            {
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
            },
            2_031_739_904,
            311,
        ),
        ({}, 8_822_848_512 // 2, 399),
        (
            {"hidden_size": 4096, "intermediate_size": 12288, "block_size": None},
            16_381_470_720 // 2,
            399,
        ),
        (
            {"hidden_size": 4096, "intermediate_size": 12288, "mask_token_id": None},
            16_381_470_720 // 2,
            399,
        ),
    ],
    ids=["1.7B", "4B", "8B", "TraDo-8B"],
)
def test_sdar_has_its_published_size(
    tmp_path: Path, changes: dict[str, Any], parameters: int, tensors: int
) -> None:
    """SDAR 1.7B, 4B and 8B, and TraDo, have the parameters of their index files, and blocks of 4.

    Their configs may lack the block's length and the mask token.
    """
    config = {k: v for k, v in (SDAR_4B | changes).items() if v is not None}
    spec = read(tmp_path, config, QWEN_GENERATION)
    names = names_of(sdar, spec)
    assert spec.weight_bytes(1) == parameters
    assert len(names) == len(set(names)) == tensors
    assert (spec.mask_token_id, spec.eos_token_ids) == (151669, (151643, 151645))
    assert (spec.head_dim, spec.num_kv_heads, spec.max_model_len) == (128, 8, 32768)
    assert spec.blocks == BlockAttention(block_length=4, threshold=0.85, floor_is_schedule=True)


def test_sdars_longer_blocks_are_read(tmp_path: Path) -> None:
    """The checkpoints with blocks of 8 to 64 say so in config.json."""
    spec = read(tmp_path, SDAR_4B | {"block_size": 16}, None)
    assert spec.blocks is not None
    assert spec.blocks.block_length == 16


@pytest.mark.parametrize(
    ("changes", "parameters", "tensors"),
    [
        ({}, 15_231_233_024 // 2, 339),
        (
            {
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
                "vocab_size": 151936,
            },
            1_543_714_304,
            338,
        ),
    ],
    ids=["7B", "1.5B"],
)
def test_fast_dllm_v2_has_its_published_size(
    tmp_path: Path, changes: dict[str, Any], parameters: int, tensors: int
) -> None:
    """Fast-dLLM v2 7B and 1.5B have Qwen2.5's parameters, and blocks of 32 in parts of 8."""
    spec = read(tmp_path, FAST_DLLM_7B | changes, QWEN_GENERATION)
    names = names_of(fast_dllm, spec)
    assert spec.weight_bytes(1) == parameters
    assert len(names) == len(set(names)) == tensors
    assert (spec.mask_token_id, spec.eos_token_ids) == (151665, (151643, 151645))
    assert spec.blocks is not None
    assert (spec.blocks.block_length, spec.blocks.sub_block_length) == (32, 8)


def test_nemotron_has_its_published_size(tmp_path: Path) -> None:
    """Nemotron-Labs-Diffusion 3B fills its file of 7,663,347,000 bytes with 237 tensors."""
    spec = read(tmp_path, NEMOTRON_3B, {"eos_token_id": 2})
    names = names_of(nemotron, spec)
    assert 0 < 7_663_347_000 - spec.weight_bytes(2) < 100_000  # the file's header
    assert len(names) == len(set(names)) == 237
    assert {name.split(".")[0] for name in names} == {"encoder", "diffusion_head"}
    assert (spec.mask_token_id, spec.eos_token_ids, spec.max_model_len) == (100, (2,), 4096)
    assert spec.rope == Rope(
        theta=1e6,
        yarn=Yarn(factor=0.25, original_context=16384),
        query_scaling=QueryScaling(beta=0.1, original_context=16384),
    )
    assert spec.blocks is not None
    assert (spec.blocks.origin, spec.blocks.prompt_causal) == ("prompt_end", True)


def test_nemotron_8b_is_read(tmp_path: Path) -> None:
    """Nemotron-Labs-Diffusion 8B has Ministral 3's sizes, and its own end of text."""
    changes = {
        "eos_token_id": 11,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 262144,
        "num_hidden_layers": 34,
    }
    spec = read(tmp_path, NEMOTRON_3B | changes, None)
    assert spec.weight_bytes(1) == 8_489_553_920
    assert (spec.eos_token_ids, spec.max_model_len) == ((11,), 262144)


def test_illada_has_its_published_size(tmp_path: Path) -> None:
    """iLLaDA-8B has 7,615,025,152 parameters, with one matrix as embedding and head."""
    spec = read(tmp_path, ILLADA_8B, None)
    names = names_of(illada, spec)
    assert spec.weight_bytes(1) == 7_615_025_152
    assert len(names) == len(set(names)) == 290
    assert (spec.mask_token_id, spec.eos_token_ids, spec.blocks) == (5, (2,), None)


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
    published = tmp_path / "published"
    published.mkdir()
    spec = read(published, DREAM_7B, DREAM_GENERATION | {"eos_token_id": [151643, 151645]})
    assert spec.eos_token_ids == (151643, 151645)
