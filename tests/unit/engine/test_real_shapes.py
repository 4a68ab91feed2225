"""The real models' vocabularies, heads, special tokens and tensor names, with random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import LLM, FinishReason, Prompt, SamplingParams
from dllm_engine.sampling_params import CACHE_POLICIES
from dllm_engine.tokenizer import Tokenizer

from tests.support.cached_reference import PlainModel, generate_cached
from tests.support.checkpoints import (
    write_dream,
    write_dream_tokenizer,
    write_llada,
    write_tokenizer,
)
from tests.support.decoder import Ids
from tests.support.oracle import dream_oracle, llada_oracle
from tests.support.reference import generate

#: GSAI-ML/LLaDA-8B-Instruct but for depth, width and MLP.
LLADA_8B = {
    "d_model": 256,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
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
    "num_hidden_layers": 2,
    "intermediate_size": 384,
    "vocab_size": 152064,
    "mask_token_id": 151666,
    "eos_token_id": 151643,
    "max_position_embeddings": 131072,
}


#: Where the published tokenizers have them.
LLADA_SPECIALS = {
    "<|startoftext|>": 126080,
    "<|endoftext|>": 126081,
    "<|mdm_mask|>": 126336,
    "<|start_header_id|>": 126346,
    "<|end_header_id|>": 126347,
    "<|eot_id|>": 126348,
}
DREAM_SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    **{f"<|filler_{i}|>": i for i in range(151646, 151665)},
    "<|beginoftext|>": 151665,
    "<|mask|>": 151666,
}
MESSAGES = json.dumps(
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé <|mdm_mask|>"}]
)


@dataclasses.dataclass(frozen=True)
class Real:
    """A checkpoint of a family, and an engine that serves it."""

    family: str
    directory: Path
    llm: LLM

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the checkpoint."""
        assert self.llm.engine.tokenizer is not None
        return self.llm.engine.tokenizer

    @property
    def ids(self) -> Ids:
        """The special tokens of the checkpoint."""
        spec = self.llm.engine.spec
        return Ids(spec.mask_token_id, spec.eos_token_ids, self.llm.engine.stop_token_ids)


@pytest.fixture(scope="module", params=["llada", pytest.param("dream", marks=pytest.mark.slow)])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    """bf16 files in two shards, with a logits budget of a few rows."""
    directory = tmp_path_factory.mktemp(request.param)
    # At this scale logits are a few units large, and float32 leaves no tokens to chance.
    shape: dict[str, Any] = {"shards": 2, "dtype": torch.bfloat16, "tokenizer": False, "scale": 0.1}
    if request.param == "llada":
        write_llada(directory, **shape, **LLADA_8B)
        write_tokenizer(directory, specials=LLADA_SPECIALS)
    else:
        write_dream(directory, **shape, **DREAM_7B)
        write_dream_tokenizer(directory, specials=DREAM_SPECIALS)
    return Real(request.param, directory, LLM(directory, logits_budget_mb=16))


def test_a_real_vocabulary_goes_through_under_a_small_logits_budget(real: Real) -> None:
    """Greedy and sampled requests decode fully; greedy equals the reference on transformers'
    class."""
    llm, ids = real.llm, real.ids
    oracle = {"llada": llada_oracle, "dream": dream_oracle}[real.family]
    forward = oracle(real.directory, torch.float32)
    prompts = [[1, 2, 3], [126000, 5]]
    for temperature in (0.0, 0.8):
        params = SamplingParams(
            temperature=temperature, gen_length=6, steps=2, seed=1, ignore_eos=True
        )
        together = llm.generate(prompts, params, progress=False)
        for prompt, answer in zip(prompts, together, strict=True):
            assert ids.mask not in answer.token_ids.tolist()
            assert (answer.confidence > 0).all()
            if temperature == 0:
                reference = generate(forward, Prompt(prompt), params.resolved(), ids)
                assert answer.token_ids.tolist() == reference.tokens
        alone = llm.generate(prompts[:1], params, progress=False)[0]
        assert alone.token_ids.tolist() == together[0].token_ids.tolist()


def test_a_chat_is_rendered_with_the_real_ids(real: Real) -> None:
    """Two messages get control tokens with their published ids, and the mask token's name stays
    text."""
    ids = real.tokenizer.encode_messages(MESSAGES)
    assert real.ids.mask not in ids
    specials = [i for i in ids if i > 126000]
    text = real.tokenizer.decode(ids)
    if real.family == "llada":
        assert specials == [126080, *[126346, 126347, 126348] * 2, 126346, 126347]
        assert text == "system\n\nBe brief.user\n\nHé <|mdm_mask|>assistant\n\n"
    else:
        assert specials == [*[151644, 151645] * 2, 151644]
        assert text == "system\nBe brief.\nuser\nHé <|mdm_mask|>\nassistant\n"


def test_a_guided_chat_under_every_cache_policy_equals_its_definition(real: Real) -> None:
    """Chat messages with guidance and a rule of their family decode to the tokens of the
    definitions, for all five cache policies in one batch."""
    prompt = Prompt(real.tokenizer.encode_messages(MESSAGES))
    rule: dict[str, Any] = {"alg": "maskgit_plus"} if real.family == "dream" else {}
    params = [
        SamplingParams(
            gen_length=6, block_length=3, cfg_scale=0.5, ignore_eos=True, cache=policy, **rule
        )
        for policy in CACHE_POLICIES
    ]
    answers = real.llm.generate([prompt] * len(params), params, progress=False)
    plain = PlainModel(real.directory, torch.float32)
    for p, answer in zip(params, answers, strict=True):
        reference = generate_cached(plain, prompt, p.resolved(), real.ids)
        assert answer.token_ids.tolist() == reference.tokens, p.cache
        assert answer.confidence.tolist() == pytest.approx(reference.confidence, abs=1e-4)
        assert answer.usage.forward_passes == reference.forward_passes


def test_a_chat_ends_at_a_stop_string(real: Real) -> None:
    """The answer is cut before a stop string that spans tokens, and has that finish reason."""
    params = SamplingParams(gen_length=12, block_length=4, ignore_eos=True)
    whole = real.llm.generate(["Hi"], params, chat=True, progress=False)[0]
    assert whole.finish_reason is FinishReason.LENGTH
    assert "><" in whole.text
    cut = real.llm.generate(
        ["Hi"], dataclasses.replace(params, stop=("><",)), chat=True, progress=False
    )[0]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text == whole.text[: whole.text.index("><")]
    assert cut.usage.steps < whole.usage.steps
