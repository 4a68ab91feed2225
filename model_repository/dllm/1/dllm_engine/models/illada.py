"""iLLaDA (8B Base, Instruct): a Llama without a causal mask, decoded as LLaDA is.

Names and fields: GSAI-ML's modeling_illada.py (arXiv 2606.25331). Its files name no mask token; the
authors' `generate` takes id 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_engine.models import hf_layout
from dllm_engine.models.base import ModelSpec

ARCHITECTURES = ("ILLaDAForCausalLM",)
#: The `model_type` that identifies the family too, in lower case.
MODEL_TYPE = "illada"
#: The mask token's name and published id.
MASK_TOKEN = ("<[MASK]>", 5)
#: Tensors that a checkpoint may hold without effect: the head is the embedding.
IGNORED = ("lm_head.weight",)

#: Config fields and the only values that this engine implements.
_REQUIRED = {
    "hidden_act": "silu",
    "layer_norm_eps": None,  # a number asks for LayerNorm in place of RMSNorm
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
}


def spec(config: Mapping[str, Any], stop_ids: tuple[int, ...]) -> ModelSpec:
    """Read iLLaDA's Llama-style config.

    Raises:
        KeyError: a required field is missing.
        ValueError: a field asks for an architecture other than iLLaDA's.
    """
    hf_layout.require(config, _REQUIRED)
    attention_bias = config.get("attention_bias", False)
    return hf_layout.read_spec(
        config,
        stop_ids,
        qkv_bias=attention_bias,
        rope_types=("default",),
        architecture=ARCHITECTURES[0],
        tied_head=True,
        out_bias=attention_bias,
        mlp_bias=config.get("mlp_bias", False),
    )


tensors = hf_layout.tensors
