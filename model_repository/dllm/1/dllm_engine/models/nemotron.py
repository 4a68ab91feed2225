"""Nemotron-Labs-Diffusion (3B, 8B, 14B): a Ministral 3 that also reads both ways inside a block.

Names and fields: nvidia/Nemotron-Labs-Diffusion-3B-Base, config.json and
modeling_nemotron_labs_diffusion.py; decoding: its `generate` (arXiv 2607.05722). Finished tokens
are read causally, as by any left-to-right model; only the block that is decoded sees all of itself.
The adapter in `linear_spec_lora/` is not read: it makes drafts better, and no answer different.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from dllm_engine.models import hf_layout
from dllm_engine.models.base import BlockAttention, ModelSpec

ARCHITECTURES = (
    "NemotronLabsDiffusionModel",
    # Names in older copies of the files.
    "NemotronLabsDiffusionEncoderModel",
    "MinistralDiffEncoderModel",
)
#: The mask token's published id. No published file gives its name.
MASK_TOKEN = (None, 100)

#: Config fields and the only values that this engine implements.
_REQUIRED = {
    "attention_bias": False,
    "dlm_paradigm": "bidirectional",
    "hidden_act": "silu",
    "mlp_bias": False,
    # The checkpoints that read images (`…_vlm`) are not supported.
    "model_type": "nemotron_labs_diffusion",
    "sliding_window": None,
}


def spec(config: Mapping[str, Any], stop_ids: tuple[int, ...]) -> ModelSpec:
    """Read Nemotron's Ministral-style config.

    Raises:
        KeyError: a required field is missing.
        ValueError: a field asks for an architecture other than Nemotron's.
    """
    hf_layout.require(config, _REQUIRED)
    blocks = BlockAttention(
        block_length=config.get("block_size") or 32,
        origin="prompt_end",
        prompt_causal=True,
        first_token_given=True,
        threshold=0.9,
        threshold_inclusive=True,
    )
    return hf_layout.read_spec(config, stop_ids, qkv_bias=False, blocks=blocks)


tensors = functools.partial(hf_layout.tensors, root="encoder", head="diffusion_head.weight")
