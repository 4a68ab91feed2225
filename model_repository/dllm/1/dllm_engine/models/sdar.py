"""SDAR (1.7B, 4B, 8B) and TraDo: a Qwen3 whose tokens see their own and earlier blocks.

Names and fields: JetLM/SDAR-4B-Chat, config.json and modeling_sdar.py; decoding: generate.py of
JetAstra/SDAR, `block_diffusion_generate` (arXiv 2510.06303).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_engine.models import hf_layout
from dllm_engine.models.base import BlockAttention, ModelSpec

ARCHITECTURES = ("SDARForCausalLM",)
#: The mask token's name and published id. Not all copies of config.json hold the id.
MASK_TOKEN = ("<|MASK|>", 151669)
#: Tokens per block where config.json does not say: that of the checkpoints without a suffix.
_BLOCK_LENGTH = 4

#: Config fields and the only values that this engine implements.
_REQUIRED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "sliding_window": None,
    "use_sliding_window": False,
}


def spec(config: Mapping[str, Any], stop_ids: tuple[int, ...]) -> ModelSpec:
    """Read SDAR's Qwen3-style config.

    Raises:
        KeyError: a required field is missing.
        ValueError: a field asks for an architecture other than SDAR's.
    """
    hf_layout.require(config, _REQUIRED)
    blocks = BlockAttention(
        block_length=config.get("block_size") or _BLOCK_LENGTH,
        threshold=0.85,
        floor_is_schedule=True,
    )
    return hf_layout.read_spec(
        config,
        stop_ids,
        qkv_bias=False,
        qk_norm=True,
        head_dim=config["head_dim"],
        blocks=blocks,
    )


tensors = hf_layout.tensors
