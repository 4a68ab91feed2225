"""Dream (7B Base, Instruct, Coder; DiffuCoder): a Qwen2 without a causal mask, logits shifted.

Names and fields: Dream-org/Dream-v0-Instruct-7B, config.json and modeling_dream.py. The hidden
state at position i predicts the token at i + 1; position 0 is predicted from itself
(generation_utils.py, `_sample`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_engine.models import hf_layout
from dllm_engine.models.base import ModelSpec

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
    hf_layout.require(config, _REQUIRED)
    return hf_layout.read_spec(
        config,
        stop_ids,
        qkv_bias=True,
        rope_types=("default",),
        max_model_len=min(config["max_position_embeddings"], _TRAINED_CONTEXT),
        shifted=True,
    )


tensors = hf_layout.tensors
