"""Log-probabilities, steps of commit and several choices, through OpenAI's own client."""

from dataclasses import replace
from typing import Any

import openai
import pytest
from adapter_fakes import HANG, ScriptedEngine, denoising, until
from openai import AsyncOpenAI
from openai_calls import CHAT, QUESTION, TEXT, post

from adapter.api.choices import choice_seed
from adapter.types import Event, TokenDetail, TopLogprob, Usage

#: The bytes that each token adds: an é of two tokens, a special token, and the end.
TOKENS = [b"a", b"\xc3", b"\xa9", b"", b"<>b", b""]
OTHER = TopLogprob(7, "x", [120], -2.5)


def detailed(text: str, ready: int, reason: str = "", *, end: int = 0) -> Event:
    """An event whose first `ready` tokens are final; `end` counts the one that ends the text."""
    details: list[TokenDetail | None] = [
        TokenDetail(
            i, token.decode(errors="replace"), list(token), 6 - i, -0.25 * i - 0.25, [OTHER]
        )
        for i, token in enumerate(TOKENS)
    ]
    shown = details[: ready + end] + [None] * (len(TOKENS) - ready - end)
    return Event(text, reason, Usage(3, ready + end, 1, 1), 7, details=shown)


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine that writes `aé<>b` in three steps; a stop string may begin with `<`."""
    steps = [detailed("a", 2), detailed("aé", 5), detailed("aé<>b", 5, "stop", end=1)]
    return ScriptedEngine([list(steps)])


async def test_a_chat_has_the_log_probability_of_each_token(
    client: AsyncOpenAI, engine: ScriptedEngine
) -> None:
    """Whole and streamed alike: the text's tokens, bytes and alternatives; not the end token."""
    ask: Any = {"model": "dllm", "messages": QUESTION, "logprobs": True, "top_logprobs": 1}
    answer = await client.chat.completions.create(**ask)
    assert engine.requests[0]["logprobs"] == 1
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    content = logprobs.content
    assert content is not None
    assert [bytes(token.bytes or []) for token in content] == TOKENS[:5]
    assert [token.logprob for token in content] == [-0.25, -0.5, -0.75, -1.0, -1.25]
    assert content[0].top_logprobs[0].model_dump() == {
        "token": "x",
        "bytes": [120],
        "logprob": -2.5,
    }
    streamed = []
    async for chunk in await client.chat.completions.create(**ask, stream=True):
        found = chunk.choices[0].logprobs
        piece = chunk.choices[0].delta.content or ""
        new = found.content if found and found.content else []
        streamed += new
        # What is sent with a text is what the text is made of.
        assert b"".join(bytes(t.bytes or []) for t in new).decode() == piece
    assert streamed == content
    await client.chat.completions.create(model="dllm", messages=QUESTION, logprobs=True)
    assert engine.requests[-1]["logprobs"] == 0


async def test_a_completion_has_them_in_the_older_format(client: AsyncOpenAI, url: str) -> None:
    """Four lists; half a character by its bytes, and offsets in characters of the text."""
    answer = await client.completions.create(model="dllm", prompt="hi", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", r"bytes:\xc3", r"bytes:\xa9", "", "<>b"]
    assert logprobs.token_logprobs == [-0.25, -0.5, -0.75, -1.0, -1.25]
    assert logprobs.text_offset == [0, 1, 1, 2, 2]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"x": -2.5, "a": -0.25}
    raw = (await post(url, TEXT, {"model": "dllm", "prompt": "hi", "reveal_steps": True})).json()
    assert raw["choices"][0]["reveal_steps"] == [6, 5, 4, 3, 2]


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (CHAT, {"logprobs": 5}, "logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (TEXT, {"logprobs": 21}, "logprobs"),
        (TEXT, {"logprobs": True}, "logprobs"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"n": 17}, "n"),
    ],
)
async def test_bad_values_are_refused(url: str, path: str, fields: Any, name: str) -> None:
    """The error names the field."""
    prompt = {"messages": QUESTION} if path == CHAT else {"prompt": "hi"}
    answer = await post(url, path, {"model": "dllm", **prompt, **fields})
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]


async def test_choices_have_seeds_of_their_own(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """Choice i has a seed that follows from the call's seed and i; usage is the sum."""
    answer = await client.chat.completions.create(model="dllm", messages=QUESTION, n=3, seed=11)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 18)
    seeds = [request["seed"] for request in engine.requests]
    assert seeds == [choice_seed(11, i) for i in range(3)]
    assert seeds[0] == 11
    assert len(set(seeds)) == 3
    assert all(0 <= int(str(seed)) < 2**53 for seed in seeds)
    several = await client.completions.create(model="dllm", prompt=["a", "b"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    prompts = [request["text_input"] for request in engine.requests[3:]]
    assert prompts == ["a", "a", "b", "b"]
    assert all("seed" not in request for request in engine.requests[3:])


async def test_streamed_choices_interleave_and_end_together(
    client: AsyncOpenAI, engine: ScriptedEngine
) -> None:
    """Each chunk names its choice; closing the stream cancels all of them."""
    engine.scripts = [[replace(event, seed=i) for event in denoising(3)] for i in range(2)]
    stream = await client.chat.completions.create(model="dllm", messages=QUESTION, n=2, stream=True)
    texts = {0: "", 1: ""}
    order = []
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            order.append(choice.index)
    assert texts == {0: "<0><1><2>", 1: "<0><1><2>"}
    assert order != sorted(order)
    engine.scripts = [[*denoising(3)[:1], HANG]]
    hanging = await client.chat.completions.create(
        model="dllm", messages=QUESTION, n=2, stream=True
    )
    closed = engine.closed
    await hanging.close()
    await until(lambda: engine.closed == closed + 2)


async def test_a_key_may_not_ask_for_more_choices_than_it_may_hold(client: AsyncOpenAI) -> None:
    """More choices than DLLM_MAX_CHOICES are an error that names the limit."""
    with pytest.raises(openai.BadRequestError, match=r"n: .*16"):
        await client.completions.create(model="dllm", prompt="a", n=17)
