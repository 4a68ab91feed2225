"""Block-wise models get, in any batch, the tokens of a loop without any cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import LLM, InvalidRequest, Prompt, SamplingParams
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.blockwise_reference import (
    KINDS,
    BlockResult,
    generate_blocks,
    generate_left_to_right,
)
from tests.support.budget import examples
from tests.support.cases import Case, run_with_arrivals
from tests.support.decoder import Ids
from tests.support.family_checkpoints import FAMILIES, mask_of, write_family
from tests.support.log_probs import assert_log_probs
from tests.support.native import MaskedForward, causal_before, native

#: The trained lengths of the tiny checkpoints, and the families' own rules.
BLOCK_LENGTH = {"sdar": 4, "fast_dllm": 32, "nemotron": 8}
OWN_RULE: dict[str, dict[str, Any]] = {
    "sdar": {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.85},
    "fast_dllm": {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.9},
    "nemotron": {"confidence_threshold": 0.9},
}
#: SDAR's rules and others, with thresholds that a random model sometimes reaches.
RULES: tuple[dict[str, Any], ...] = (
    {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.1},
    {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.3},
    {"remasking": "low_confidence"},
    {"remasking": "sequential"},
    {"entropy_bound": 4.0},
    {"confidence_threshold": 0.15},
    {"remasking": "entropy"},
    {"remasking": "margin"},
    {"factor": 1.5},
)


def ids_of(family: str) -> Ids:
    """Special tokens of a family's tiny checkpoint."""
    specials = FAMILIES[family].specials
    names = ("<|endoftext|>", "<|im_end|>")
    stop = tuple(specials[name] for name in names if name in specials)
    return Ids(mask_of(family), stop, stop)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A family's engine, and the truth about its logits."""

    family: str
    llm: LLM
    forward: MaskedForward

    def expected(self, case: Case) -> BlockResult:
        """The slow loop's answer to one request."""
        params = case.params
        if params.block_length is None:
            params = dataclasses.replace(params, block_length=BLOCK_LENGTH[self.family])
        rule = ("remasking", "confidence_threshold", "entropy_bound", "factor")
        if all(getattr(params, name) is None for name in rule):
            params = dataclasses.replace(params, **OWN_RULE[self.family])
        # A threshold alone is that of the family's own rule.
        if params.confidence_threshold is not None and params.remasking is None:
            own = OWN_RULE[self.family].get("remasking")
            params = dataclasses.replace(params, remasking=own)
        steps = params.gen_length if params.steps is None else params.steps
        params = dataclasses.replace(params, steps=steps, seed=params.seed or 0)
        kind, ids = KINDS[self.family], ids_of(self.family)
        return generate_blocks(self.forward, kind, case.ids, params, ids)


@pytest.fixture(scope="module", params=KINDS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Each family in float64, with a budget so small that prompts are read in chunks."""
    directory = write_family(tmp_path_factory.mktemp(request.param), request.param)
    llm = LLM(directory, dtype="float64", max_num_batched_tokens=160, max_num_seqs=6)
    return Subject(request.param, llm, native(directory, torch.float64))


@st.composite
def block_cases(draw: st.DrawFn, family: str) -> Case:
    """A request of any rule, block length and schedule."""
    gen_length = draw(st.integers(1, 32))
    block_length = draw(st.sampled_from([None, None, 4, 8, 16]))
    size = block_length or BLOCK_LENGTH[family]
    least = -(-gen_length // size)
    params = SamplingParams(
        gen_length=gen_length,
        block_length=block_length,
        steps=draw(st.none() | st.integers(least, gen_length)),
        ignore_eos=draw(st.booleans()),
        cache=draw(st.sampled_from([None, None, "none"])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.8])),
        seed=draw(st.integers(0, 2**31)),
        logprobs=draw(st.sampled_from([None, 0, 3])),
        **draw(st.sampled_from([{}, *RULES])),
    )
    prompt = draw(st.lists(st.integers(128, 499), min_size=1, max_size=80))
    return Case(draw(st.integers(0, 30)), prompt, params)


@settings(
    max_examples=examples(18),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
    deadline=None,
)
@given(data=st.data())
def test_tokens_equal_a_loop_without_a_cache(subject: Subject, data: st.DataObject) -> None:
    """Any mix of rules, block lengths, steps, ends, caches, arrivals: the loop's tokens, from the
    same steps and with the same log-probabilities."""
    batch = data.draw(st.lists(block_cases(subject.family), min_size=1, max_size=4))
    finished = run_with_arrivals(subject.llm, batch)
    for case, update in zip(batch, finished, strict=True):
        expected = subject.expected(case)
        assert update.token_ids.tolist() == expected.tokens
        prefill = update.usage.steps - expected.steps  # chunks of a long prompt come before
        committed = [step + prefill if step > 0 else step for step in expected.reveal_steps]
        assert update.reveal_steps.tolist() == committed
        mask, num_top = mask_of(subject.family), case.params.logprobs
        assert_log_probs(update, expected.log_probs, mask=mask, num_top=num_top)


@pytest.mark.parametrize("family", KINDS)
def test_float32_tokens_of_the_own_rule_equal_the_loop(tmp_path: Path, family: str) -> None:
    """With the family's own rule and block, at temperature 0 and in float32: 8 mixed requests."""
    directory = write_family(tmp_path, family)
    forward = native(directory, torch.float32)
    llm = LLM(directory, dtype="float32", max_num_batched_tokens=128)
    generator = torch.Generator().manual_seed(11)
    size = BLOCK_LENGTH[family]
    # A prompt of less than a block, of exactly one or two, and with every remainder.
    lengths = [1, size - 1, size, size + 1, 2 * size, 41, 70, 75]
    prompts = [torch.randint(128, 499, (n,), generator=generator).tolist() for n in lengths]
    params = [SamplingParams(gen_length=9 + 2 * i) for i in range(len(lengths))]
    answers = llm.generate(prompts, params, progress=False)
    subject = Subject(family, llm, forward)
    for prompt, p, answer in zip(prompts, params, answers, strict=True):
        assert answer.token_ids.tolist() == subject.expected(Case(0, prompt, p)).tokens


def test_a_block_costs_no_pass_more_than_its_steps(subject: Subject) -> None:
    """A request alone takes as many passes as the loop has decoding steps: no pass finishes a block
    for its own sake."""
    prompt = list(range(200, 210))  # short enough for one chunk
    for rule in ({}, RULES[0], RULES[3]):
        params = SamplingParams(gen_length=22, ignore_eos=True, **rule)
        answer = subject.llm.generate([prompt], params, progress=False)[0]
        expected = subject.expected(Case(0, prompt, params))
        assert answer.token_ids.tolist() == expected.tokens
        assert answer.usage.forward_passes == expected.steps


def test_blocks_of_one_are_greedy_left_to_right_decoding(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Nemotron with blocks of one token decodes as any causal model does."""
    directory = write_family(tmp_path_factory.mktemp("nemotron"), "nemotron")
    forward = native(directory, torch.float32)
    llm = LLM(directory, dtype="float32")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(128, 499, (n,), generator=generator).tolist() for n in (1, 9, 30)]
    params = SamplingParams(gen_length=24, block_length=1)
    for prompt, answer in zip(prompts, llm.generate(prompts, params), strict=True):
        expected = generate_left_to_right(forward, prompt, 24, ids_of("nemotron"))
        assert answer.token_ids[: len(expected)].tolist() == expected


@pytest.mark.parametrize("seed", [1, 2])
def test_speculation_changes_no_token(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Nemotron's self-speculation, beside other requests, gives the greedy left-to-right answers,
    and each token's log-probability given those before it.

    The model only ever writes two tokens, so that some of a draft is often right: a token takes
    fewer steps than a draft and a check.
    """
    directory = write_family(tmp_path_factory.mktemp("nemotron"), "nemotron", seed=seed)
    tensors = load_file(directory / "model.safetensors")
    tensors["diffusion_head.weight"][:200] = 0
    tensors["diffusion_head.weight"][202:] = 0
    save_file(tensors, directory / "model.safetensors")
    forward = native(directory, torch.float32)
    llm = LLM(directory, dtype="float32", max_num_batched_tokens=128)
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 8, 30, 75, 21, 3, 40]
    batch = []
    for i, length in enumerate(lengths):
        prompt = torch.randint(128, 499, (length,), generator=generator).tolist()
        cache = "none" if i in (1, 4) else None
        block_length = (None, 2, 5, 8, 32, 7, 3)[i]
        params = SamplingParams(
            gen_length=25,
            block_length=block_length,
            remasking="speculative",
            cache=cache,
            logprobs=2,
        )
        batch.append(Case(3 * i, prompt, params))
        batch.append(Case(2 * i, prompt[::-1], SamplingParams(gen_length=9)))
    answers = run_with_arrivals(llm, batch)
    steps = tokens = 0
    for case, answer in list(zip(batch, answers, strict=True))[::2]:
        steps += answer.usage.forward_passes
        expected = generate_left_to_right(forward, case.ids, 25, ids_of("nemotron"))
        assert answer.token_ids[: len(expected)].tolist() == expected
        assert set(answer.token_ids[len(expected) :].tolist()) <= {mask_of("nemotron")}
        sequence = torch.tensor(case.ids + expected)
        logits = forward(sequence, causal_before(len(sequence), len(sequence)))
        causal: list[torch.Tensor | None] = [*logits[len(case.ids) - 1 : -1].log_softmax(1)]
        causal += [None] * (25 - len(expected))
        assert_log_probs(answer, causal, mask=mask_of("nemotron"), num_top=2, abs=1e-4)
        tokens += len(expected)
    assert steps < 1.8 * tokens


@pytest.mark.parametrize("family", ["sdar", "fast_dllm"])
def test_speculation_needs_a_model_that_reads_left_to_right(
    tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    """Models whose finished blocks see themselves as a whole cannot check a draft."""
    llm = LLM(write_family(tmp_path_factory.mktemp(family), family))
    with pytest.raises(InvalidRequest, match="remasking: speculative needs a model"):
        llm.generate([[200]], SamplingParams(remasking="speculative"))


def test_a_prompt_and_bound_beyond_the_context_are_refused(subject: Subject) -> None:
    """The error names the bound, both lengths and the context."""
    with pytest.raises(InvalidRequest, match=r"gen_length: .*500 tokens.*\(20\).*at most 512"):
        subject.llm.generate([[200] * 500], SamplingParams(gen_length=20))


def test_another_block_length_is_warned_of_once(
    subject: Subject, caplog: pytest.LogCaptureFixture
) -> None:
    """A length that the checkpoint was not trained for is served, with one line in the log."""
    with caplog.at_level("WARNING", logger="dllm_engine"):
        for _ in range(2):
            subject.llm.generate([[200]], SamplingParams(gen_length=2, block_length=5))
    trained = BLOCK_LENGTH[subject.family]
    assert caplog.text.count(f"block_length 5: the checkpoint was trained for {trained}") == 1


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("fields", [{}, {"block_length": 32}, {"cache": "none"}])
def test_headroom_ends_where_the_context_or_its_last_block_does(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    """A prompt longer by the headroom is served, one more token is refused: with a context that is
    no multiple of blocks or pages, and a budget below it."""
    directory = write_family(tmp_path, family)
    llm = LLM(directory, max_model_len=100, kv_page_size=16, max_num_batched_tokens=64)
    params = SamplingParams(gen_length=3, **fields)
    request = llm.engine.make_request(Prompt([200] * 10), params)
    longest = 10 + llm.engine.headroom(request)
    (answer,) = llm.generate([[200] * longest], params, progress=False)
    assert answer.usage.prompt_tokens == longest
    with pytest.raises(InvalidRequest):
        llm.generate([[200] * (longest + 1)], params)
