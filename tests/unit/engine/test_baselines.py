"""The benchmarks compare the engine with loops that decode the same tokens."""

from pathlib import Path

import torch
from dllm_engine import LLM, SamplingParams

from benchmarks.baselines import LibraryLlama, PlainLlama, Work, fast_dllm, reference
from benchmarks.block_baselines import BlockWork, PlainSdar, sdar
from tests.support.checkpoints import MASK
from tests.support.family_checkpoints import mask_of, write_family


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


def test_the_loop_of_sdar_decodes_what_the_engine_decodes(tmp_path: Path) -> None:
    """Alone and in a static batch, whether a prompt ends within a block or not."""
    directory = write_family(tmp_path, "sdar")
    plain, llm = PlainSdar(directory), LLM(directory)
    for length, threshold in ((20, 0.85), (23, 0.05)):
        prompts = torch.randint(0, 499, (3, length), generator=torch.Generator().manual_seed(2))
        work = BlockWork(10, 4, mask_of("sdar"), threshold)
        params = SamplingParams(
            gen_length=10,
            block_length=4,
            remasking="low_confidence_dynamic",
            confidence_threshold=threshold,
            ignore_eos=True,
        )
        answers = llm.generate(prompts.tolist(), params, progress=False)
        expected = [answer.token_ids.tolist() for answer in answers]
        assert sdar(plain, prompts, work).tolist() == expected
        assert sdar(plain, prompts[:1], work).tolist() == expected[:1]
