"""LLaDA (8B Base, Instruct, 1.5): a Llama with renamed tensors and no causal mask.

Names and fields: GSAI-ML/LLaDA-8B-Instruct, config.json and modeling_llada.py. Note that
`blocks.N.ff_out` is a down projection while `transformer.ff_out` is the language-model head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_engine.models.base import ModelSpec
from dllm_engine.ops.rotary import Rope

ARCHITECTURES = ("LLaDAModelLM",)

#: Config fields and the only values that this engine implements.
_REQUIRED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "include_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}


def spec(config: Mapping[str, Any], stop_ids: tuple[int, ...]) -> ModelSpec:
    """Read LLaDA's OLMo-style config.

    Raises:
        KeyError: a required field is missing.
        ValueError: a field asks for an architecture other than LLaDA's.
    """
    for key, expected in _REQUIRED.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"{key}: only {expected!r} is supported, got {config[key]!r}")
    d_model, num_heads = config["d_model"], config["n_heads"]
    return ModelSpec(
        architecture=config["architectures"][0],
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=d_model,
        intermediate_size=config.get("mlp_hidden_size") or config["mlp_ratio"] * d_model,
        num_layers=config["n_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("n_kv_heads") or num_heads,
        head_dim=d_model // num_heads,
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope=Rope(theta=config["rope_theta"]),
        max_model_len=config["max_sequence_length"],
        mask_token_id=config["mask_token_id"],
        eos_token_ids=stop_ids,
        qkv_bias=config.get("include_qkv_bias", False),
        tied_head=config["weight_tying"],
        shifted=False,
    )


def tensors(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Map each parameter to the checkpoint tensors that it stacks along the rows."""
    root = "model.transformer"
    table: dict[str, tuple[str, ...]] = {
        "embedding": (f"{root}.wte.weight",),
        "final_norm": (f"{root}.ln_f.weight",),
    }
    if not spec.tied_head:
        table["head_weight"] = (f"{root}.ff_out.weight",)
    for i in range(spec.num_layers):
        block, layer = f"{root}.blocks.{i}", f"layers.{i}"
        table[f"{layer}.attention_norm"] = (f"{block}.attn_norm.weight",)
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            table[f"{layer}.qkv.{kind}"] = tuple(f"{block}.{x}_proj.{kind}" for x in "qkv")
        table[f"{layer}.out.weight"] = (f"{block}.attn_out.weight",)
        table[f"{layer}.mlp_norm"] = (f"{block}.ff_norm.weight",)
        table[f"{layer}.gate_up.weight"] = (f"{block}.ff_proj.weight", f"{block}.up_proj.weight")
        table[f"{layer}.down.weight"] = (f"{block}.ff_out.weight",)
    return table
