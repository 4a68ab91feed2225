"""Dream (7B Base, Instruct, Coder; DiffuCoder): a Qwen2 without a causal mask, logits shifted.

Names and fields: Dream-org/Dream-v0-Instruct-7B, config.json and modeling_dream.py. The hidden
state at position i predicts the token at i + 1; position 0 is predicted from itself
(generation_utils.py, `_sample`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_engine.models.base import ModelSpec
from dllm_engine.ops.rotary import Rope

ARCHITECTURES = ("DreamModel",)

#: Config fields and the only values that this engine implements.
_REQUIRED = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_mrope": False,
    "use_sliding_window": False,
}
#: Context length for input and output together, as stated by Dream's authors. The config's
#: `max_position_embeddings` belongs to the model that Dream was initialised from.
_TRAINED_CONTEXT = 2048


def spec(config: Mapping[str, Any], stop_ids: tuple[int, ...]) -> ModelSpec:
    """Read Dream's Qwen2-style config.

    Raises:
        KeyError: a required field is missing.
        ValueError: a field asks for an architecture other than Dream's.
    """
    for key, expected in _REQUIRED.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"{key}: only {expected!r} is supported, got {config[key]!r}")
    num_heads = config["num_attention_heads"]
    # transformers 5 writes this field in place of `rope_theta` and `rope_scaling`.
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_parameters: only rope_type 'default' is supported, got {kind!r}")
    return ModelSpec(
        architecture=config["architectures"][0],
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config["hidden_size"] // num_heads,
        rms_norm_eps=config["rms_norm_eps"],
        rope=Rope(theta=rope["rope_theta"] if rope else config["rope_theta"]),
        max_model_len=min(config["max_position_embeddings"], _TRAINED_CONTEXT),
        mask_token_id=config["mask_token_id"],
        eos_token_ids=stop_ids,
        qkv_bias=True,
        tied_head=config.get("tie_word_embeddings", False),
        shifted=True,
    )


def tensors(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Map each parameter to the checkpoint tensors that it stacks along the rows."""
    table: dict[str, tuple[str, ...]] = {
        "embedding": ("model.embed_tokens.weight",),
        "final_norm": ("model.norm.weight",),
    }
    if not spec.tied_head:
        table["head_weight"] = ("lm_head.weight",)
    for i in range(spec.num_layers):
        source, layer = f"model.layers.{i}", f"layers.{i}"
        table[f"{layer}.attention_norm"] = (f"{source}.input_layernorm.weight",)
        for kind in ("weight", "bias"):
            projections = tuple(f"{source}.self_attn.{x}_proj.{kind}" for x in "qkv")
            table[f"{layer}.qkv.{kind}"] = projections
        table[f"{layer}.out.weight"] = (f"{source}.self_attn.o_proj.weight",)
        table[f"{layer}.mlp_norm"] = (f"{source}.post_attention_layernorm.weight",)
        mlp = f"{source}.mlp"
        table[f"{layer}.gate_up.weight"] = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        table[f"{layer}.down.weight"] = (f"{mlp}.down_proj.weight",)
    return table
