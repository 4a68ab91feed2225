"""What the Triton model `dllm` answers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from dllm_engine import LLM, Prompt, SamplingParams
from transformers import PreTrainedTokenizerFast

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import Answer, events, generate, open_http_stream
from tests.support.checkpoints import MASK

SAMPLED = {"text_input": "tell me", "temperature": 0.8, "gen_length": 48, "block_length": 16}


def test_generate_answers_once(triton: TritonServer) -> None:
    """A request gets one answer with the text, the canvas, its confidences, usage and seed."""
    answer = generate(triton, text_input="hello", gen_length=24, ignore_eos=True, seed=5)
    assert answer.text
    assert len(answer.token_ids) == len(answer.confidence) == 24
    assert MASK not in answer.token_ids
    assert all(0 <= confidence <= 1 for confidence in answer.confidence)
    assert answer.finish_reason == "length"
    assert answer.usage == (len("hello"), 24, 24, 24, 0)
    assert answer.seed == 5


def test_stream_shows_every_step(triton: TritonServer) -> None:
    """With `stream` there is one event per step; what is committed stays, the rest is masked."""
    fields = SAMPLED | {"seed": 3, "steps": 20, "ignore_eos": True}
    steps = list(events(open_http_stream(triton, fields)))
    assert [step.usage[2] for step in steps] == list(range(1, 21))
    assert [step.finish_reason for step in steps] == [""] * 19 + ["length"]
    for step in steps:
        masked = [token == MASK for token in step.token_ids]
        assert masked == [confidence == -1 for confidence in step.confidence]
        assert steps[-1].text.startswith(step.text)
    for before, after in pairwise(steps):
        for i, token in enumerate(before.token_ids):
            if token != MASK:
                assert after.token_ids[i] == token
                assert after.confidence[i] == before.confidence[i]
    assert steps[-1] == generate(triton, **fields)


def test_stream_says_what_each_position_shows(triton: TritonServer) -> None:
    """Every event has the active block and a text for each position; joined, they are the text."""
    fields = {"text_input": "hello", "gen_length": 20, "block_length": 8, "ignore_eos": True}
    with open_http_stream(triton, fields) as response:
        steps = [json.loads(line[6:]) for line in response.iter_lines() if line]
    blocks = [tuple(step["block"]) for step in steps]
    assert blocks == [(0, 0, 8)] * 7 + [(1, 8, 16)] * 8 + [(2, 16, 20)] * 5
    for step in steps:
        for token, text in zip(step["token_ids"], step["token_texts"], strict=True):
            assert token != MASK or text == ""
    shown = "".join(steps[-1]["token_texts"])
    assert shown == steps[-1]["text_output"].replace("\ufffd", "")


def test_stop_string_that_has_begun_is_not_shown(triton: TritonServer) -> None:
    """No event of a stream shows text that the answer, once it is cut, does not begin with."""
    fields = {"text_input": "count", "gen_length": 48, "block_length": 4, "ignore_eos": True}
    whole = generate(triton, **fields).text
    stop = whole[20:26]
    steps = list(events(open_http_stream(triton, fields | {"stop": [stop]})))
    assert steps[-1].text == whole[: whole.index(stop)]
    assert all(steps[-1].text.startswith(step.text) for step in steps)


def test_given_tokens_are_certain(triton: TritonServer) -> None:
    """Tokens that a canvas came with have confidence 1; only what is masked has −1."""
    fields = {"text_input": "hello", "canvas_ids": [65, MASK, MASK, 66]}
    first, last = events(open_http_stream(triton, fields))
    assert sorted(first.confidence)[0] == -1
    for step in (first, last):
        assert (step.confidence[0], step.confidence[3]) == (1, 1)
        assert [c == -1 for c in step.confidence] == [token == MASK for token in step.token_ids]


def test_stream_interval_thins_the_events(triton: TritonServer) -> None:
    """With a `stream_interval` events come at most so often, and the last one always comes."""
    fields = {"text_input": "hello", "gen_length": 8, "ignore_eos": True, "stream_interval": 3600.0}
    steps = list(events(open_http_stream(triton, fields)))
    assert [step.finish_reason for step in steps] == ["length"]


def test_seed_fixes_the_text(triton: TritonServer) -> None:
    """The same request and seed make the same text, alone or among sixteen others."""
    fields = SAMPLED | {"seed": 1234}
    alone = generate(triton, **fields)
    others = [
        {"text_input": f"other {i}", "temperature": 1.0, "gen_length": 20 + 3 * i, "seed": i}
        for i in range(16)
    ]
    with ThreadPoolExecutor(17) as pool:
        asked = [pool.submit(generate, triton, **other) for other in others[:8]]
        among = pool.submit(generate, triton, **fields)
        asked += [pool.submit(generate, triton, **other) for other in others[8:]]
        assert among.result() == alone
    assert len({tuple(future.result().token_ids) for future in asked}) == 16


def test_seed_is_reported(triton: TritonServer) -> None:
    """A request without a seed gets one at random, which repeats its text when given."""
    first, second = generate(triton, **SAMPLED), generate(triton, **SAMPLED)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    assert generate(triton, **SAMPLED, seed=first.seed) == first


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"gen_length": 40, "block_length": 8, "steps": 20},
        {"gen_length": 24, "cfg_scale": 1.5},
        {"gen_length": 32, "confidence_threshold": 0.3},
        {"gen_length": 32, "confidence_threshold": 0.05, "credit": True},
        {"gen_length": 24, "temperature": 0.7, "seed": 11, "remasking": "random"},
        {"gen_length": 24, "temperature": 1.0, "seed": 12, "top_k": 5, "top_p": 0.9},
        {"gen_length": 40, "block_length": 8, "cache": "prefix", "delay_steps": 1},
        {"gen_length": 40, "block_length": 8, "cache": "dual", "refresh_interval": 3},
        # ⌊0.7 · 10⌋ positions: the ratio arrives as it was typed, not as the nearest float32.
        {"gen_length": 10, "block_length": 8, "cache": "sparse", "retention_ratio": 0.7},
        {"gen_length": 40, "block_length": 8, "cache": "delayed", "cfg_scale": 1.0},
    ],
    ids=str,
)
def test_equals_the_engine_in_process(
    triton: TritonServer, llm: LLM, params: dict[str, object]
) -> None:
    """Through Triton a request gets the very tokens that the engine makes in this process."""
    answer = generate(triton, text_input="a prompt", **params)
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    [expected] = llm.generate(["a prompt"], sampling, progress=False)
    assert answer.token_ids == expected.token_ids.tolist()
    assert answer.text == expected.text
    assert answer.confidence == pytest.approx(expected.confidence.tolist(), abs=1e-6)
    assert answer.finish_reason == expected.finish_reason.value
    assert answer.usage[2:4] == (expected.usage.steps, expected.usage.forward_passes)


def test_three_forms_of_a_prompt(triton: TritonServer, checkpoint: Path) -> None:
    """`messages` are rendered by the chat template; `text_input` and `input_ids` are as given."""
    rendered = (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    messages = json.dumps([{"role": "user", "content": "hi"}])
    answers = [
        generate(triton, **prompt, gen_length=12, seed=1)
        for prompt in ({"text_input": rendered}, {"input_ids": ids}, {"messages": messages})
    ]
    assert answers[0].usage[0] == len(ids)
    assert answers[0] == answers[1] == answers[2]


def test_mask_text_is_only_text(triton: TritonServer) -> None:
    """A prompt that spells out the mask token is text like any other, not a hole to fill."""
    mask = "<|mdm_mask|>"
    assert generate(triton, text_input=mask, gen_length=4).usage[0] == len(mask)
    with_end = generate(triton, text_input="<|eot_id|>", gen_length=4)
    assert with_end.usage[0] == 1  # the other special tokens work in a hand-written template


def test_stop_string_cuts(triton: TritonServer) -> None:
    """The text ends before the first stop string, and the finish reason says so."""
    fields = {"text_input": "count", "gen_length": 48, "ignore_eos": True}
    whole = generate(triton, **fields).text
    stop = whole[len(whole) // 2]
    answer: Answer = generate(triton, **fields, stop=["never to be found", stop])
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "prompt", "params"),
    [
        (
            {"suffix": "end", "gen_length": 12},
            {"suffix_ids": "end"},
            {"gen_length": 12},
        ),
        (
            {"canvas_ids": [65, MASK, MASK, 66]},
            {"canvas_ids": [65, MASK, MASK, 66]},
            {"gen_length": 4},
        ),
        ({"alg": "entropy", "steps": 6}, {}, {"alg": "entropy", "steps": 6}),
        ({"entropy_bound": 3.0}, {}, {"entropy_bound": 3.0}),
    ],
    ids=["suffix", "canvas_ids", "alg", "entropy_bound"],
)
def test_gaps_and_rules_reach_the_engine(
    triton: TritonServer,
    llm: LLM,
    fields: dict[str, object],
    prompt: dict[str, object],
    params: dict[str, object],
) -> None:
    """Infilling and the decoding rules give over Triton what they give in-process."""

    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    given = {
        name: tokenizer.encode_suffix(value) if isinstance(value, str) else value
        for name, value in prompt.items()
    }
    asked = Prompt(tokenizer.encode_text("hello"), **given)  # type: ignore[arg-type]
    here = llm.generate([asked], SamplingParams(**params), progress=False)[0]  # type: ignore[arg-type]
    there = generate(triton, text_input="hello", **fields)
    assert there.token_ids == here.token_ids.tolist()
    assert there.usage[3] == here.usage.forward_passes
