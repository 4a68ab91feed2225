"""Hugging Face's names of config fields and tensors, as Llama, Qwen and most families use them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dllm_engine.models.base import ModelSpec
from dllm_engine.ops.rotary import QueryScaling, Rope, Yarn

#: All fields of `rope_parameters` and `rope_scaling` that this engine knows, without their kinds.
_ROPE_FIELDS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "max_position_embeddings", "llama_4_scaling_beta"),
        *("factor", "original_max_position_embeddings", "attention_factor", "truncate"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    }
)


def require(config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Check fields that may have only one value, which is also that of an absent field.

    Raises:
        ValueError: names the first field that has another value.
    """
    for key, expected in values.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"{key}: only {expected!r} is supported, got {config[key]!r}")


def read_spec(
    config: Mapping[str, Any],
    stop_ids: tuple[int, ...],
    *,
    qkv_bias: bool,
    rope_types: tuple[str, ...] = ("default", "yarn"),
    **differences: Any,
) -> ModelSpec:
    """Read a spec from fields with Llama's names.

    Args:
        config: config.json.
        stop_ids: end-of-text tokens.
        qkv_bias: whether queries, keys and values have biases.
        rope_types: kinds of rotary embedding that the family may have.
        differences: other fields of `ModelSpec`, instead of those that `config` gives.

    Raises:
        KeyError: a required field is missing.
        ValueError: a field asks for what this engine does not implement.
    """
    num_heads = config["num_attention_heads"]
    fields: dict[str, Any] = {
        "architecture": config["architectures"][0],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // num_heads,
        "rms_norm_eps": config["rms_norm_eps"],
        "rope": read_rope(config, rope_types),
        "max_model_len": config["max_position_embeddings"],
        "mask_token_id": config["mask_token_id"],
        "eos_token_ids": stop_ids,
        "qkv_bias": qkv_bias,
        "tied_head": config.get("tie_word_embeddings", False),
        "shifted": False,
    }
    return ModelSpec(**(fields | differences))


def read_rope(config: Mapping[str, Any], kinds: tuple[str, ...]) -> Rope:
    """Read the rotary embedding, from the fields of transformers 4 or of transformers 5.

    YaRN's numbers are those of transformers' `_compute_yarn_parameters`.

    Raises:
        KeyError: a required field is missing.
        ValueError: another kind than `kinds`, or a field that is not known.
    """
    # transformers 5 writes `rope_parameters` in place of `rope_theta` and `rope_scaling`.
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given: Mapping[str, Any] = config.get(name) or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in kinds:
        known = " or ".join(map(repr, kinds))
        raise ValueError(f"{name}: only rope_type {known} is supported, got {kind!r}")
    unknown = sorted(set(given) - _ROPE_FIELDS)
    if unknown:
        raise ValueError(f"{name}: {unknown[0]} is not supported")
    theta = given.get("rope_theta") or config["rope_theta"]
    scaling = None
    if (beta := given.get("llama_4_scaling_beta")) is not None:
        context = given["original_max_position_embeddings"]
        scaling = QueryScaling(beta=beta, original_context=context)
    yarn = None if kind == "default" else _yarn(given, config["max_position_embeddings"])
    return Rope(theta=theta, yarn=yarn, query_scaling=scaling)


def _yarn(given: Mapping[str, Any], context: int) -> Yarn:
    original = given.get("original_max_position_embeddings") or context
    factor = given.get("factor") or context / original
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        wide, deep = given.get("mscale"), given.get("mscale_all_dim")
        attention_factor = _magnitude(factor, 1.0)
        if wide and deep:
            attention_factor = _magnitude(factor, wide) / _magnitude(factor, deep)
    return Yarn(
        factor=factor,
        original_context=original,
        beta_fast=given.get("beta_fast") or 32.0,
        beta_slow=given.get("beta_slow") or 1.0,
        attention_factor=attention_factor,
        truncate=given.get("truncate", True),
    )


def _magnitude(factor: float, weight: float) -> float:
    """YaRN's factor of cosines and sines (arXiv 2309.00071, eq. 22), with DeepSeek's weight."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def tensors(
    spec: ModelSpec, *, root: str = "model", head: str = "lm_head.weight"
) -> dict[str, tuple[str, ...]]:
    """Map each parameter to the checkpoint tensors that it stacks along the rows.

    Args:
        spec: the model.
        root: what the backbone's names begin with.
        head: the head's name.
    """
    table: dict[str, tuple[str, ...]] = {
        "embedding": (f"{root}.embed_tokens.weight",),
        "final_norm": (f"{root}.norm.weight",),
    }
    if not spec.tied_head:
        table["head_weight"] = (head,)
    for i in range(spec.num_layers):
        table |= _layer(spec, f"{root}.layers.{i}", f"layers.{i}")
    return table


def _layer(spec: ModelSpec, source: str, layer: str) -> dict[str, tuple[str, ...]]:
    def stacked(part: str, names: tuple[str, ...], *, bias: bool) -> dict[str, tuple[str, ...]]:
        kinds = ("weight", "bias") if bias else ("weight",)
        return {
            f"{layer}.{part}.{kind}": tuple(f"{source}.{name}_proj.{kind}" for name in names)
            for kind in kinds
        }

    table: dict[str, tuple[str, ...]] = {
        f"{layer}.attention_norm": (f"{source}.input_layernorm.weight",),
        f"{layer}.mlp_norm": (f"{source}.post_attention_layernorm.weight",),
    }
    table |= stacked("qkv", tuple(f"self_attn.{x}" for x in "qkv"), bias=spec.qkv_bias)
    table |= stacked("out", ("self_attn.o",), bias=spec.out_bias)
    table |= stacked("gate_up", ("mlp.gate", "mlp.up"), bias=spec.mlp_bias)
    table |= stacked("down", ("mlp.down",), bias=spec.mlp_bias)
    if spec.qk_norm:
        for x in "qk":
            table[f"{layer}.{x}_norm"] = (f"{source}.self_attn.{x}_norm.weight",)
    return table
