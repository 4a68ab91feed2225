"""Continuous batching gives each request what the papers' loop gives it alone."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dllm_engine import LLM, CanvasUpdate, Completion, EngineConfig, Prompt, SamplingParams
from dllm_engine.state.canvas import CanvasTable
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.budget import examples
from tests.support.cases import IDS, RULES, Case, cases, run_with_arrivals
from tests.support.checkpoints import write_dream
from tests.support.log_probs import assert_log_probs
from tests.support.oracle import dream_oracle, llada_oracle
from tests.support.reference import Forward, ReferenceResult, generate

#: Batches of requests shrink slowly and gain little from it.
NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A family's engine in float64, and the truth about its logits."""

    family: str
    llm: LLM
    forward: Forward

    def expected(self, prompt: Prompt, params: SamplingParams) -> ReferenceResult:
        """The reference's answer to one request."""
        return generate(self.forward, prompt, params.resolved(), IDS[self.family])


@pytest.fixture(scope="module", params=["llada", "dream"])
def subject(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    """Either family. A budget of 300 rows, so that requests wait and take turns."""
    is_dream = request.param == "dream"
    directory = write_dream(tmp_path_factory.mktemp("dream")) if is_dream else checkpoint
    oracle = (dream_oracle if is_dream else llada_oracle)(directory, torch.float64)
    llm = LLM(directory, dtype="float64", max_num_batched_tokens=300, max_num_seqs=8)
    return Subject(request.param, llm, oracle)


#: The property tests mix all rules with both families, so that a change need not wait for these.
ONE_FAMILY = pytest.mark.parametrize(
    "subject", ["llada", pytest.param("dream", marks=pytest.mark.slow)], indirect=True
)


def assert_equal(
    answer: CanvasUpdate | Completion, reference: ReferenceResult, abs: float = 1e-6
) -> None:
    """Identical tokens, steps, and confidences but for rounding."""
    assert answer.token_ids.tolist() == reference.tokens
    assert answer.confidence.tolist() == pytest.approx(reference.confidence, abs=abs)
    assert answer.usage.forward_passes == reference.forward_passes


@settings(
    max_examples=examples(40),
    phases=NO_SHRINK,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(batch=st.lists(cases(), min_size=1, max_size=10))
def test_tokens_equal_the_reference(subject: Subject, batch: list[Case]) -> None:
    """Any mix of rules, samplings, guidance, lengths, blocks, steps, ends, gaps and arrivals; with
    the step and the log-probability of each token."""
    finished = run_with_arrivals(subject.llm, batch)
    for case, update in zip(batch, finished, strict=True):
        prompt = case.prompt(IDS[subject.family].mask)
        reference = subject.expected(prompt, case.params)
        assert_equal(update, reference, abs=1e-5 if case.params.credit else 1e-6)
        assert update.reveal_steps.tolist() == reference.reveal_steps
        mask = IDS[subject.family].mask
        assert_log_probs(update, reference.log_probs, mask=mask, num_top=case.params.logprobs)


#: Fixed requests: each of these at every temperature, with and without filters.
SCHEDULES: list[dict[str, Any]] = [
    {"gen_length": 24, "block_length": 8, "steps": 12},
    {"gen_length": 21, "block_length": 8, "steps": 13},  # remainders, a shorter last block
    {"gen_length": 9, "block_length": 9, "steps": 12},
    *(
        {"gen_length": 17, "block_length": 9, "steps": 5, "remasking": remasking}
        for remasking in ("random", "entropy", "margin")
    ),
    *(
        {"gen_length": n, "steps": steps, "alg": alg, "alg_temp": alg_temp}
        for alg in ("origin", "maskgit_plus", "topk_margin", "entropy")
        for n, steps, alg_temp in ((16, 16, 0.0), (12, 5, 0.4), (10, 18, 0.0), (7, 1, 0.0))
    ),
    # Blocks of 4, 5 and 4 steps, each with a time schedule of its own.
    *(
        {"gen_length": 20, "block_length": 7, "steps": 13, "alg": alg}
        for alg in ("origin", "maskgit_plus", "entropy")
    ),
]
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.1, "top_p": 0.8},
    {"temperature": 1.1, "top_k": 9},
    {"temperature": 1.1, "top_p": 0.9, "top_k": 9},
]


@ONE_FAMILY
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_schedules_and_dreams_algorithms_equal_the_reference(
    subject: Subject, sampling: dict[str, Any]
) -> None:
    """LLaDA's transfer schedule and Dream's four algorithms, all in one batch: identical tokens."""
    generator = torch.Generator().manual_seed(3)
    prompts = [
        Prompt(torch.randint(0, 499, (2 + i,), generator=generator).tolist())
        for i in range(len(SCHEDULES))
    ]
    params = [
        SamplingParams(ignore_eos=True, seed=7 + i, **schedule, **sampling)
        for i, schedule in enumerate(SCHEDULES)
    ]
    answers = subject.llm.generate(prompts, params, progress=False)
    for prompt, p, answer in zip(prompts, params, answers, strict=True):
        assert_equal(answer, subject.expected(prompt, p))


@ONE_FAMILY
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_equals_the_reference_beside_longer_blocks(
    subject: Subject, rule: dict[str, Any]
) -> None:
    """Blocks of 6, 10 and 32 tokens in one batch: what a rule sees ends with its own block."""
    # LocalLeap looks to both sides: too few prompts do not show it looking too far.
    count = 24 if "anchor_threshold" in rule else 8
    generator = torch.Generator().manual_seed(5)
    prompts = [
        Prompt(torch.randint(0, 499, (3 + 2 * i,), generator=generator).tolist())
        for i in range(count)
    ]
    lengths = [10, 6, 10, 32] * (count // 4)
    params = [
        SamplingParams(
            gen_length=32,
            # A list of credit holds 16 tokens: a block of more steps may need more.
            block_length=min(length, 16) if "credit" in rule else length,
            ignore_eos=True,
            seed=i,
            **rule,
        )
        for i, length in enumerate(lengths)
    ]
    answers = subject.llm.generate(prompts, params, progress=False)
    for prompt, p, answer in zip(prompts, params, answers, strict=True):
        abs = 1e-5 if p.credit else 1e-6
        assert_equal(answer, subject.expected(prompt, p), abs=abs)


def test_confidence_past_the_end_of_a_shorter_block_is_minus_one(subject: Subject) -> None:
    """Columns that only a longer neighbour has hold −1, whatever the block's start was committed
    with, since they repeat its position."""
    table = CanvasTable(
        2,
        16,
        8,
        mask=IDS[subject.family].mask,
        stop=np.array([501]),
        shifted=subject.family == "dream",
        device="cpu",
    )
    defaults = EngineConfig(model_path=Path()).cache_defaults
    for slot, length in enumerate((3, 8)):
        params = SamplingParams(gen_length=8, block_length=length, anchor_threshold=0.5)
        resolved = params.with_cache_defaults(defaults).resolved()
        table.fill(slot, Prompt([5, 6]), resolved)
    plan = table.plan_step([0, 1])
    blocks = plan.blocks
    assert blocks.masked.sum(axis=1).tolist() == [3, 8]
    first = blocks.column == 0
    confidence = np.where(blocks.request == 0, 0.5, 0.25)
    table.advance(plan, np.where(first, 7, -1), confidence)
    plan = table.plan_step([0, 1])
    assert plan.blocks.masked.sum(axis=1).tolist() == [2, 7]
    assert plan.committed is not None
    assert plan.committed.tolist() == [[0.5] + [-1.0] * 7, [0.25] + [-1.0] * 7]


def test_credit_equals_its_definition_and_touches_no_neighbour(subject: Subject) -> None:
    """Requests with credit, of several blocks and thresholds, among others with filters, noise and
    entropies: the tokens of a full credit matrix; the others what they are without them."""
    generator = torch.Generator().manual_seed(13)
    ids = [torch.randint(0, 499, (4 + 5 * i,), generator=generator).tolist() for i in range(8)]
    base = SamplingParams(gen_length=28, block_length=14, ignore_eos=True)
    others: list[dict[str, Any]] = [
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
    llm = subject.llm
    together = llm.generate(ids, params, progress=False)
    differs = False
    for prompt, p, answer in zip(ids, params, together, strict=True):
        if not p.credit:
            alone = llm.generate([prompt], p, progress=False)[0]
            assert answer.token_ids.tolist() == alone.token_ids.tolist()
            continue
        assert_equal(answer, subject.expected(Prompt(prompt), p), abs=1e-5)
        plain = dataclasses.replace(p, credit=False)
        without = llm.generate([prompt], plain, progress=False)[0]
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
        reference = generate(forward, Prompt(prompt), p.resolved(), IDS["llada"])
        assert answer.token_ids.tolist() == reference.tokens


def _bits(answer: Completion) -> tuple[list[int], bytes, list[bytes]]:
    log_probs = () if answer.log_probs is None else vars(answer.log_probs).values()
    values = [array.tobytes() for array in log_probs]
    return answer.token_ids.tolist(), answer.confidence.tobytes(), values


@pytest.mark.parametrize("temperature", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_a_request_is_bitwise_the_same_alone_and_in_any_batch(llm: LLM, temperature: float) -> None:
    """In float32, tokens, confidences and log-probabilities of a request do not depend on its
    neighbours by a bit.

    With all threads, since they divide the rows among themselves.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(0, 512, (3 + 7 * i,), generator=generator).tolist() for i in range(8)]
    base = SamplingParams(temperature=temperature, gen_length=24, block_length=8, ignore_eos=True)
    params = [dataclasses.replace(base, seed=100 + i, cfg_scale=i % 2) for i in range(8)]
    params[1::3] = [dataclasses.replace(p, logprobs=4) for p in params[1::3]]
    together = llm.generate(prompts, params, progress=False)
    reversed_order = llm.generate(prompts[::-1], params[::-1], progress=False)[::-1]
    for i in range(8):
        alone = llm.generate([prompts[i]], params[i], progress=False)[0]
        assert _bits(alone) == _bits(together[i]) == _bits(reversed_order[i])
