"""Continuous batching gives each request what the papers' loop gives it alone."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import LLM, Completion, Prompt, SamplingParams
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import DREAM_MASK, MASK, write_dream
from tests.support.oracle import dream_oracle, llada_oracle
from tests.support.reference import (
    Forward,
    ReferenceResult,
    generate,
    generate_credit,
    generate_dream,
)

#: Batches of requests shrink slowly and gain little from it.
NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)

Case = tuple[int, list[int], SamplingParams]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """(arrival step, prompt, parameters) of one greedy request."""
    gen_length = draw(st.integers(1, 28))
    block_length = draw(st.integers(1, gen_length))
    num_blocks = -(-gen_length // block_length)
    params = SamplingParams(
        gen_length=gen_length,
        block_length=block_length,
        steps=draw(st.integers(num_blocks, gen_length + 3)),
        cfg_scale=draw(st.sampled_from([0.0, 0.0, 0.7, 2.5])),
        confidence_threshold=draw(st.sampled_from([None, None, 0.05, 0.2])),
        ignore_eos=True,
    )
    prompt = draw(st.lists(st.integers(0, 511), min_size=1, max_size=50))
    # Behind nothing but masks all positions have the same logits, and rounding alone orders them.
    assume(set(prompt) != {MASK})
    return draw(st.integers(0, 30)), prompt, params


def expected(
    forward: Forward, prompt: list[int], params: SamplingParams, mask_id: int = MASK
) -> ReferenceResult:
    """The reference's answer to one request."""
    full = params.resolved()
    assert full.block_length is not None
    assert full.steps is not None
    return generate(
        forward,
        prompt,
        mask_id=mask_id,
        gen_length=full.gen_length,
        block_length=full.block_length,
        steps=full.steps,
        cfg_scale=full.cfg_scale,
        threshold=full.confidence_threshold,
    )


def run_with_arrivals(llm: LLM, batch: list[Case]) -> dict[int, Any]:
    """Add each request at its step; final updates by the request's place in `batch`."""
    engine = llm.engine
    requests = {i: engine.make_request(Prompt(prompt), p) for i, (_, prompt, p) in enumerate(batch)}
    place = {request.request_id: i for i, request in requests.items()}
    finished: dict[int, Any] = {}
    step = 0
    while len(finished) < len(batch):
        for i, (arrival, _, _) in enumerate(batch):
            if arrival == step:
                engine.add(requests[i])
        finished |= {place[update.request_id]: update for update in engine.step()}
        step += 1
    return finished


@settings(
    max_examples=25,
    deadline=None,
    phases=NO_SHRINK,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(batch=st.lists(cases(), min_size=1, max_size=10))
def test_tokens_equal_the_reference(llm64: LLM, oracle64: Forward, batch: list[Case]) -> None:
    """Any mix of lengths, blocks, steps, guidance, thresholds and arrivals: identical tokens.

    Up to ten requests over eight slots and a budget of 512 rows, so that requests wait, take turns
    and leave at every step.
    """
    finished = run_with_arrivals(llm64, batch)
    for i, (_, prompt, params) in enumerate(batch):
        reference = expected(oracle64, prompt, params)
        assert finished[i].token_ids.tolist() == reference.tokens
        assert finished[i].confidence.tolist() == pytest.approx(reference.confidence, abs=1e-6)
        assert finished[i].usage.forward_passes == reference.forward_passes


def test_dream_tokens_equal_the_reference(tmp_path: Path) -> None:
    """Dream under continuous batching, at block borders and with guidance: identical tokens."""
    directory = write_dream(tmp_path)
    llm = LLM(directory, dtype="float64", max_num_batched_tokens=300)
    forward = dream_oracle(directory, torch.float64)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 500, (1 + 3 * i,), generator=generator).tolist() for i in range(8)]
    params = [
        SamplingParams(
            gen_length=9 + 2 * i,
            block_length=4 + i % 3,
            cfg_scale=float(i % 3 == 2),
            confidence_threshold=0.1 if i % 4 == 3 else None,
            ignore_eos=True,
        )
        for i in range(8)
    ]
    answers = llm.generate(prompts, params, progress=False)
    for prompt, p, answer in zip(prompts, params, answers, strict=True):
        assert answer.token_ids.tolist() == expected(forward, prompt, p, DREAM_MASK).tokens


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_dreams_algorithms_equal_the_reference(tmp_path: Path, alg: str) -> None:
    """Dream's own algorithms in one batch of mixed lengths and steps: identical tokens."""
    directory = write_dream(tmp_path)
    llm = LLM(directory, dtype="float64")
    forward = dream_oracle(directory, torch.float64)
    generator = torch.Generator().manual_seed(3)
    shapes = [(16, 16), (16, 5), (24, 40), (9, 1), (33, 20)]
    prompts = [torch.randint(0, 500, (2 + 5 * i,), generator=generator).tolist() for i in range(5)]
    params = [
        SamplingParams(gen_length=n, steps=steps, alg=alg, ignore_eos=True) for n, steps in shapes
    ]
    answers = llm.generate(prompts, params, progress=False)
    for prompt, (n, steps), answer in zip(prompts, shapes, answers, strict=True):
        reference = generate_dream(
            forward, prompt, mask_id=DREAM_MASK, gen_length=n, steps=steps, alg=alg
        )
        assert answer.token_ids.tolist() == reference.tokens
        assert answer.confidence.tolist() == pytest.approx(reference.confidence, abs=1e-6)
        assert answer.usage.forward_passes == reference.forward_passes


def test_credit_equals_its_definition_and_touches_no_neighbour(
    llm64: LLM, oracle64: Forward
) -> None:
    """Requests with credit, of several blocks and thresholds, among others with filters, noise and
    entropies: the tokens of a full credit matrix; the others what they are without them."""
    generator = torch.Generator().manual_seed(13)
    prompts = [torch.randint(0, 512, (4 + 5 * i,), generator=generator).tolist() for i in range(8)]
    base = SamplingParams(gen_length=28, block_length=14, ignore_eos=True)
    others = [
        {"temperature": 0.8, "seed": 3, "top_k": 9},
        {"temperature": 0.8, "seed": 3},
        {"remasking": "entropy"},
        {},
    ]
    params = [
        dataclasses.replace(base, credit=True, confidence_threshold=0.02 * (1 + i))
        if i % 2
        else dataclasses.replace(base, **others[i // 2])
        for i in range(8)
    ]
    together = llm64.generate(prompts, params, progress=False)
    differs = False
    for prompt, p, answer in zip(prompts, params, together, strict=True):
        if not p.credit:
            alone = llm64.generate([prompt], p, progress=False)[0]
            assert answer.token_ids.tolist() == alone.token_ids.tolist()
            continue
        assert p.confidence_threshold is not None
        reference = generate_credit(
            oracle64,
            prompt,
            mask_id=MASK,
            gen_length=28,
            block_length=14,
            threshold=p.confidence_threshold,
        )
        assert answer.token_ids.tolist() == reference.tokens
        assert answer.confidence.tolist() == pytest.approx(reference.confidence, abs=1e-5)
        assert answer.usage.forward_passes == reference.forward_passes
        plain = dataclasses.replace(p, credit=False)
        without = llm64.generate([prompt], plain, progress=False)[0]
        differs |= without.confidence.tobytes() != answer.confidence.tobytes()
    assert differs


def test_float32_tokens_equal_the_reference(llm: LLM, checkpoint: Any) -> None:
    """In float32 too, on fixed requests: 24 of mixed shapes in one run."""
    forward = llada_oracle(checkpoint, torch.float32)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(0, 512, (5 + 3 * i,), generator=generator).tolist() for i in range(24)]
    params = [
        SamplingParams(
            gen_length=8 + i,
            block_length=min(8, 8 + i),
            steps=(8 + i + 1) // (1 + i % 2),
            cfg_scale=0.5 * (i % 3 == 0),
            ignore_eos=True,
        )
        for i in range(24)
    ]
    answers = llm.generate(prompts, params, progress=False)
    for prompt, p, answer in zip(prompts, params, answers, strict=True):
        assert answer.token_ids.tolist() == expected(forward, prompt, p).tokens


def _bits(answer: Completion) -> tuple[list[int], bytes]:
    return answer.token_ids.tolist(), answer.confidence.tobytes()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_request_is_bitwise_the_same_alone_and_in_any_batch(llm: LLM, temperature: float) -> None:
    """In float32, tokens and confidences of a request do not depend on its neighbours by a bit.

    With all threads, since they divide the rows among themselves.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(0, 512, (3 + 7 * i,), generator=generator).tolist() for i in range(8)]
    base = SamplingParams(temperature=temperature, gen_length=24, block_length=8, ignore_eos=True)
    params = [dataclasses.replace(base, seed=100 + i, cfg_scale=i % 2) for i in range(8)]
    together = llm.generate(prompts, params, progress=False)
    reversed_order = llm.generate(prompts[::-1], params[::-1], progress=False)[::-1]
    for i in range(8):
        alone = llm.generate([prompts[i]], params[i], progress=False)[0]
        assert _bits(alone) == _bits(together[i]) == _bits(reversed_order[i])
