"""Fast-dLLM v2 (1.5B, 7B): a Qwen2 whose tokens see their own and earlier blocks.

Names and fields: Efficient-Large-Model/Fast_dLLM_v2_7B, config.json and modeling.py; decoding: its
`generate` (arXiv 2509.26328). Inside a block, the hidden state at i predicts the token at i + 1.
The first token of a block is predicted by the last row of the pass that finishes the block before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_engine.models import hf_layout
from dllm_engine.models.base import BlockAttention, ModelSpec

ARCHITECTURES = ("Fast_dLLM_QwenForCausalLM",)
#: The mask token's name and published id; config.json does not hold the id.
MASK_TOKEN = ("|<MASK>|", 151665)

#: Config fields and the only values that this engine implements.
_REQUIRED = {
    "attention_bias": True,
    "hidden_act": "silu",
    "use_sliding_window": False,
}


def spec(config: Mapping[str, Any], stop_ids: tuple[int, ...]) -> ModelSpec:
    """Read Fast-dLLM's Qwen2-style config.

    Raises:
        KeyError: a required field is missing.
        ValueError: a field asks for an architecture other than Fast-dLLM's.
    """
    hf_layout.require(config, _REQUIRED)
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("layer_types: only 'full_attention' is supported")
    blocks = BlockAttention(
        block_length=config.get("bd_size") or 32,
        shift_in_block=True,
        first_token_given=True,
        sub_block_length=8,
        threshold=0.9,
    )
    return hf_layout.read_spec(config, stop_ids, qkv_bias=True, blocks=blocks)


tensors = hf_layout.tensors
