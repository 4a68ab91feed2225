"""What the benchmarks compare with does the same work: the same tokens."""

from pathlib import Path

import torch
from dllm_engine import LLM, SamplingParams

from benchmarks.baselines import LibraryLlama, PlainLlama, Work, fast_dllm, reference
from tests.support.checkpoints import MASK


def test_baselines_decode_what_the_engine_decodes(checkpoint: Path, llm: LLM) -> None:
    """The reference equals `none` and Fast-dLLM equals `dual`, alone and in a static batch."""
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
