"""The real models' vocabularies, heads and tensor names, with few layers and random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dllm_engine import LLM, Prompt, SamplingParams

from tests.support.checkpoints import write_dream, write_llada
from tests.support.decoder import Ids
from tests.support.oracle import dream_oracle, llada_oracle
from tests.support.reference import generate

#: GSAI-ML/LLaDA-8B-Instruct but for depth, width and MLP.
LLADA_8B = {
    "d_model": 256,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 1,
    "mlp_hidden_size": 384,
    "embedding_size": 126464,
    "vocab_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
}
#: Dream-org/Dream-v0-Instruct-7B likewise: seven query heads for each key/value head.
DREAM_7B = {
    "hidden_size": 896,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 384,
    "vocab_size": 152064,
    "mask_token_id": 151666,
    "eos_token_id": 151643,
    "max_position_embeddings": 131072,
}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_real_vocabulary_goes_through_under_a_small_logits_budget(
    tmp_path: Path, family: str
) -> None:
    """bf16 files, real ids and head sizes, sharded: decoded whole, greedy and sampled alike; greedy
    as the reference does on transformers' class."""
    write = {"llada": write_llada, "dream": write_dream}[family]
    shape = {"llada": LLADA_8B, "dream": DREAM_7B}[family]
    directory = write(tmp_path, shards=2, dtype=torch.bfloat16, tokenizer=False, **shape)  # type: ignore[operator]
    llm = LLM(directory, logits_budget_mb=16)
    mask = llm.engine.spec.mask_token_id
    ids = Ids(mask, llm.engine.spec.eos_token_ids, llm.engine.stop_token_ids)
    forward = {"llada": llada_oracle, "dream": dream_oracle}[family](directory, torch.float32)
    prompts = [[1, 2, 3], [126000, 5]]
    for temperature in (0.0, 0.8):
        params = SamplingParams(
            temperature=temperature, gen_length=6, steps=2, seed=1, ignore_eos=True
        )
        together = llm.generate(prompts, params, progress=False)
        for prompt, answer in zip(prompts, together, strict=True):
            assert mask not in answer.token_ids.tolist()
            assert (answer.confidence > 0).all()
            if temperature == 0:
                reference = generate(forward, Prompt(prompt), params.resolved(), ids)
                assert answer.token_ids.tolist() == reference.tokens
        alone = llm.generate(prompts[:1], params, progress=False)[0]
        assert alone.token_ids.tolist() == together[0].token_ids.tolist()
