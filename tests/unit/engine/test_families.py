"""Checkpoints with Hugging Face's names give the logits of transformers' own classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import LLM, CheckpointError, Prompt, SamplingParams
from dllm_engine.models.loader import load_model, read_spec
from dllm_engine.ops.layout import PackedLayout
from dllm_engine.tokenizer import Tokenizer
from safetensors.torch import load_file, save_file

from tests.support.cases import Ids
from tests.support.family_checkpoints import FAMILIES, mask_of, write_family
from tests.support.native import both_ways, native
from tests.support.reference import generate

#: As in test_loader.py: logits of a few units, so that float32 has digits left.
SCALE = 0.08

LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("sdar", {}),
    ("sdar", {"shards": 3, "dtype": torch.bfloat16, "tie_word_embeddings": True}),
    ("sdar", {"head_dim": 16}),
    ("fast_dllm", {}),
    ("fast_dllm", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("nemotron", {}),
    ("nemotron", {"head_dim": None, "num_key_value_heads": 4}),
    ("illada", {}),
    ("illada", {"attention_bias": True, "mlp_bias": True}),
    # Large enough for oneDNN's packed weights.
    ("illada", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 2100}),
]
#: Published numbers of 3B-Base: a factor below 1, and no scaling within 16,384 tokens.
NEMOTRON_3B_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 0.25,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
LAYOUTS += [
    ("nemotron", {"rope_parameters": NEMOTRON_3B_ROPE}),
    ("nemotron", {"rope_parameters": NEMOTRON_3B_ROPE | {"factor": 4.0, "mscale": None}}),
    (
        "sdar",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            }
        },
    ),
]


def logits_of(directory: Path, lengths: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of packed sequences whose tokens see each other, [rows, vocab]."""
    model = load_model(directory, read_spec(directory), device="cpu", dtype=torch.float32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.inference_mode():
        hidden = model(tokens, positions, PackedLayout.of(lengths))
        return model.head.all_logits(model.head_input(hidden))


@pytest.mark.parametrize(("family", "layout"), LAYOUTS, ids=str)
def test_logits_equal_those_of_transformers(
    tmp_path: Path, family: str, layout: dict[str, Any]
) -> None:
    """Packed logits equal those of Qwen3, Qwen2, Ministral3 or Llama where all see all."""
    directory = write_family(tmp_path, family, scale=SCALE, **layout)
    forward = both_ways(native(directory, torch.float32))
    lengths = [1, 17, 17, 75]
    tokens = torch.randint(0, 512, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    packed = logits_of(directory, lengths, tokens).split(lengths)
    for sequence, logits in zip(tokens.split(lengths), packed, strict=True):
        expected = forward(sequence)
        assert 1 < expected.abs().max() < 12
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def edit_config(directory: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes a field."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("sdar", {"attention_bias": True}, "attention_bias: only False"),
        ("sdar", {"sliding_window": 4096}, "sliding_window: only None"),
        (
            "sdar",
            {"rope_scaling": {"type": "dynamic"}},
            "rope_scaling: only rope_type 'default' or",
        ),
        ("sdar", {"rope_scaling": {"factor": 2.0, "low_freq_factor": 1}}, "low_freq_factor is not"),
        ("sdar", {"hidden_act": "gelu"}, "hidden_act: only 'silu'"),
        ("sdar", {"architectures": ["SDARMoeForCausalLM"]}, "architecture SDARMoeForCausalLM; sup"),
        ("fast_dllm", {"attention_bias": False}, "attention_bias: only True"),
        ("fast_dllm", {"layer_types": ["sliding_attention"]}, "layer_types: only"),
        ("nemotron", {"dlm_paradigm": "block_diff"}, "dlm_paradigm: only 'bidirectional'"),
        ("nemotron", {"model_type": "nemotron_labs_diffusion_vlm"}, "model_type: only 'nemotron"),
        ("nemotron", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: only rope_ty"),
        ("illada", {"layer_norm_eps": 1e-5}, "layer_norm_eps: only None"),
        ("illada", {"rope_scaling": {"type": "yarn"}}, "rope_scaling: only None"),
        ("illada", {"tie_word_embeddings": False}, "tie_word_embeddings: only True"),
        ("illada", {"hidden_size": None}, "hidden_size is missing"),
        ("sdar", {"head_dim": None}, "head_dim is missing"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_is_refused_by_field(
    tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    """A config that asks for what is not implemented is refused, with the field's name."""
    write_family(tmp_path, family)
    edit_config(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        read_spec(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_found_by_its_name(tmp_path: Path, family: str) -> None:
    """Where config.json has no mask token, the tokenizer's token with the family's name counts."""
    write_family(tmp_path, family)
    edit_config(tmp_path, mask_token_id=None)
    if family == "nemotron":  # its mask has no published name
        edit_config(tmp_path, mask_token_id=100)
    spec = read_spec(tmp_path)
    assert spec.mask_token_id == mask_of(family)
    assert Tokenizer.load(tmp_path, spec.mask_token_id) is not None


def test_a_mask_that_the_files_disagree_on_is_refused(tmp_path: Path) -> None:
    """config.json and tokenizer must name the same mask token."""
    write_family(tmp_path, "sdar", mask_token_id=504)
    with pytest.raises(CheckpointError, match=r"mask_token_id: 504, but .*<\|MASK\|> is 505"):
        read_spec(tmp_path)


def test_a_published_mask_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """Without a tokenizer the published id counts, if the model has such a token."""
    write_family(tmp_path, "fast_dllm", tokenizer=False)
    with pytest.raises(CheckpointError, match="mask_token_id: 151665, beyond the vocabulary of 51"):
        read_spec(tmp_path)


@pytest.mark.parametrize("model_type", ["illada", "iLLaDA", "ILLADA"])
def test_illada_is_known_by_its_model_type(tmp_path: Path, model_type: str) -> None:
    """The class of an iLLaDA may have any name, and its head may stand beside the embedding."""
    write_family(tmp_path, "illada", model_type=model_type, architectures=["AnotherName"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    spec = read_spec(tmp_path)
    model = load_model(tmp_path, spec, device="cpu", dtype=torch.float32)
    assert (spec.mask_token_id, spec.eos_token_ids, spec.tied_head) == (5, (2,), True)
    assert torch.equal(model.embedding, tensors["lm_head.weight"])


def test_illadas_tokens_are_those_of_lladas_loop(tmp_path: Path) -> None:
    """iLLaDA, whose mask has id 5, is decoded in a mixed batch as LLaDA's loop decodes it alone."""
    directory = write_family(tmp_path, "illada", attention_bias=True)
    forward = both_ways(native(directory, torch.float32))
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(6, 512, (5 + 3 * i,), generator=generator).tolist() for i in range(16)]
    params = [
        SamplingParams(
            gen_length=8 + i,
            block_length=min(8, 8 + i),
            steps=(8 + i + 1) // (1 + i % 2),
            cfg_scale=0.5 * (i % 3 == 0),
            remasking=("low_confidence", "entropy")[i % 2],
        )
        for i in range(16)
    ]
    answers = LLM(directory, dtype="float32").generate(prompts, params, progress=False)
    for prompt, p, answer in zip(prompts, params, answers, strict=True):
        reference = generate(forward, Prompt(prompt), p.resolved(), Ids(5, (2,), (2,)))
        assert answer.token_ids.tolist() == reference.tokens
