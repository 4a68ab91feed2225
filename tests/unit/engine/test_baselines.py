"""The benchmarks compare the engine with loops that decode the same tokens."""

from pathlib import Path

import torch
from dllm_engine import LLM, SamplingParams

from benchmarks.baselines import LibraryLlama, PlainLlama, Work, fast_dllm, reference
from tests.support.checkpoints import MASK


def test_parallel_baseline_decodes_what_the_engine_decodes(checkpoint: Path, llm: LLM) -> None:
    """Fast-dLLM with a threshold decodes the same as `dual` with that threshold, in fewer steps
    than tokens."""
    plain = PlainLlama(checkpoint)
    prompts = torch.randint(0, 499, (3, 20), generator=torch.Generator().manual_seed(2))
    fewest = 16
    for threshold in (0.9, 0.1, 0.02):
        work = Work(gen_length=16, block_length=8, mask_id=MASK, threshold=threshold)
        params = SamplingParams(
            gen_length=16,
            block_length=8,
            ignore_eos=True,
            cache="dual",
            confidence_threshold=threshold,
        )
        answers = llm.generate(prompts.tolist(), params, progress=False)
        fewest = min(fewest, *(answer.usage.steps for answer in answers))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert fast_dllm(plain, prompt[None], work)[0].tolist() == answer.token_ids.tolist()
    assert fewest < 12


def test_baselines_decode_what_the_engine_decodes(checkpoint: Path, llm: LLM) -> None:
    """The reference decodes the same as `none`, and Fast-dLLM the same as `dual`, alone and in a
    static batch."""
    plain, work = PlainLlama(checkpoint), Work(gen_length=16, block_length=8, mask_id=MASK)
    prompts = torch.randint(0, 499, (3, 20), generator=torch.Generator().manual_seed(2))
    for policy, generate in (("none", reference), ("dual", fast_dllm)):
        params = SamplingParams(gen_length=16, block_length=8, ignore_eos=True, cache=policy)
        answers = llm.generate(prompts.tolist(), params, progress=False)
        expected = [answer.token_ids.tolist() for answer in answers]
        assert generate(plain, prompts, work).tolist() == expected
        assert generate(plain, prompts[:1], work).tolist() == expected[:1]
        if policy == "none":
            library = LibraryLlama(checkpoint)
            assert reference(library, prompts, work).tolist() == expected
