"""OpenAI's own clients against the whole service."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from dllm_client import Client
from dllm_engine import LLM, Prompt, SamplingParams
from openai import OpenAI

from launcher.tritonserver import TritonServer
from tests.support.servers import CHECKOUT, AdapterServer, eventually, metric, settled_counters

ASK: Any = [{"role": "user", "content": "tell me"}]
FIELDS: dict[str, Any] = {"temperature": 0.7, "seed": 5}
DIFFUSION: dict[str, Any] = {"block_length": 8, "ignore_eos": True}
NPM_SECONDS = 120
PINNED = CHECKOUT / "tests/clients/package.json"


@pytest.fixture(scope="module")
def client(adapter: AdapterServer) -> Iterator[OpenAI]:
    """OpenAI's client for Python."""
    with OpenAI(base_url=f"{adapter.url}/v1", api_key="-", max_retries=0) as opened:
        yield opened


def expected(llm: LLM, **params: Any) -> Any:
    """What the engine answers in this process."""
    sampling = SamplingParams(gen_length=24, **params)
    return llm.generate(["tell me"], sampling, chat=True, progress=False)[0]


def test_chat_equals_the_engine(client: OpenAI, llm: LLM) -> None:
    """Text, reason and token counts of a conversation are exactly the engine's."""
    answer = client.chat.completions.create(
        model="dllm", messages=ASK, max_tokens=24, extra_body=DIFFUSION, **FIELDS
    )
    here = expected(llm, **FIELDS, **DIFFUSION)

    assert answer.choices[0].message.content == here.text
    assert answer.choices[0].finish_reason == here.finish_reason.value == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == here.usage.prompt_tokens
    assert answer.usage.completion_tokens == here.usage.completion_tokens == 24


def test_log_probabilities_equal_the_engine(
    client: OpenAI, adapter: AdapterServer, llm: LLM
) -> None:
    """Those of a chat, whole and streamed, and of a job, are the engine's; so are its steps."""
    ask: Any = {
        "model": "dllm", "messages": ASK, "max_tokens": 24, "logprobs": True, "top_logprobs": 2,
        "extra_body": DIFFUSION, **FIELDS,
    }  # fmt: skip
    here = expected(llm, logprobs=2, reveal_steps=True, **FIELDS, **DIFFUSION).log_probs
    assert here is not None
    answer = client.chat.completions.create(**ask).choices[0]
    assert answer.logprobs is not None
    content = answer.logprobs.content
    assert content is not None
    assert len(content) > 18  # a random model's text may end within a character
    found = [(one.logprob, *(other.logprob for other in one.top_logprobs)) for one in content]
    both = zip(here.chosen.tolist(), here.top.tolist(), strict=True)
    assert found == [(chosen, *top) for chosen, top in both][: len(content)]
    streamed = []
    for chunk in client.chat.completions.create(**ask, stream=True):
        if (part := chunk.choices[0].logprobs) is not None:
            streamed += part.content or []
    assert streamed == content
    with Client(adapter.url) as native:
        fields: dict[str, Any] = {"logprobs": 2, "reveal_steps": True, **FIELDS, **DIFFUSION}
        ours = native.wait(native.submit("tell me", gen_length=24, **fields))
        stored = native.result(ours.request_id)
    assert stored.tokens == ours.tokens
    assert ours.tokens is not None
    assert [token.logprob for token in ours.tokens] == here.chosen.tolist()
    steps = expected(llm, reveal_steps=True, **FIELDS, **DIFFUSION).reveal_steps.tolist()
    assert [token.step for token in ours.tokens] == steps


def test_a_response_equals_the_engine(client: OpenAI, llm: LLM) -> None:
    """By the newer call, whole and streamed, a conversation has the engine's text and counts."""
    ask: Any = {
        "model": "dllm", "input": "tell me", "max_output_tokens": 24, "temperature": 0.7,
        "extra_body": {"seed": 5, **DIFFUSION},
    }  # fmt: skip
    here = expected(llm, **FIELDS, **DIFFUSION)
    answer = client.responses.create(**ask)
    assert (answer.output_text, answer.status) == (here.text, "incomplete")
    assert answer.usage is not None
    assert answer.usage.input_tokens == here.usage.prompt_tokens
    assert answer.usage.output_tokens == 24
    with client.responses.stream(**ask) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == here.text
    assert len(deltas) > 1


def test_stream_is_the_same_text_in_pieces(client: OpenAI, llm: LLM) -> None:
    """Streamed, a conversation has the same text, in several pieces, and the same usage."""
    stream = client.chat.completions.create(
        model="dllm",
        messages=ASK,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=DIFFUSION,
        **FIELDS,
    )
    *chunks, last = stream
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]

    here = expected(llm, **FIELDS, **DIFFUSION)
    assert "".join(pieces) == here.text
    assert len(pieces) > 1
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage is not None
    assert last.usage.completion_tokens == here.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_stop_is_honoured_exactly(client: OpenAI, stream: bool) -> None:
    """The text ends before the stop string, of which a stream never shows a part."""
    fields: dict[str, Any] = {"model": "dllm", "prompt": "count", "max_tokens": 48}
    whole = client.completions.create(**fields, extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[20:24]
    answer = client.completions.create(
        **fields, stop=stop, stream=stream, extra_body={"ignore_eos": True}
    )
    chunks = list(answer) if stream else [answer]

    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_prompts_are_seen_as_they_are(client: OpenAI, llm: LLM) -> None:
    """A completion's prompts, as texts or as tokens, go to the model without a template."""
    assert llm.engine.tokenizer is not None
    prompts = ["one prompt", "another"]
    ids = [llm.engine.tokenizer.encode_text(prompt) for prompt in prompts]
    sampling = SamplingParams(gen_length=16)
    asked = [Prompt(one) for one in ids]
    here = llm.generate(asked, sampling, progress=False)

    for prompt in (prompts, ids):
        answer = client.completions.create(model="dllm", prompt=prompt)
        assert [choice.text for choice in answer.choices] == [one.text for one in here]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(len(one) for one in ids)
        assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in here)


def test_engines_refusal_names_the_parameter(client: OpenAI) -> None:
    """A refusal by the engine is a 400 in OpenAI's shape, streaming or not."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="dllm", prompt="x" * 1100, stream=stream)
        assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
        reason = "its 1100 tokens leave no room for an answer in the model's 1024"
        assert reason in caught.value.message


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 4096}])
def test_answer_fits_the_context(client: OpenAI, fields: dict[str, Any]) -> None:
    """A chat gets the length that its prompt leaves, whatever it asks for."""
    question: Any = [{"role": "user", "content": "x" * 950}]
    fields = fields | {"extra_body": {"ignore_eos": True, "steps": 16, "block_length": 32}}
    answer = client.chat.completions.create(model="dllm", messages=question, **fields)

    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens < 128
    assert answer.usage.total_tokens == 1024
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_place(client: OpenAI, triton: TritonServer, stream: bool) -> None:
    """A client that gives up, streaming or not, ends its request in the engine."""
    cancelled = settled_counters(triton)["dllm_requests_cancelled_total"]
    long: dict[str, Any] = {"max_tokens": 512, "extra_body": {"ignore_eos": True, "cfg_scale": 1}}
    if stream:
        with client.completions.create(model="dllm", prompt="a", stream=True, **long) as chunks:
            next(iter(chunks))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="dllm", prompt="a", timeout=0.5, **long)
    eventually(
        lambda: metric(triton, "dllm_requests_cancelled_total") == cancelled + 1,
        "the request is cancelled",
    )
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "its place is free")


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which node finds OpenAI's client."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}')
    version = json.loads(PINNED.read_text())["dependencies"]["openai"]
    install = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--fetch-retries=0",
        f"openai@{version}",
    ]
    try:
        subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=NPM_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot install the client here: {error}")
    shutil.copy(Path(__file__).with_name("openai_client.mjs"), folder / "client.mjs")
    return folder


def test_node_client(node_client: Path, adapter: AdapterServer, llm: LLM) -> None:
    """OpenAI's client for Node gets the same answers, streamed too, and typed errors."""
    run = subprocess.run(
        ["node", "client.mjs", adapter.url],
        cwd=node_client,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)

    here = expected(llm, **FIELDS, **DIFFUSION)
    assert seen["text"] == "".join(seen["pieces"]) == here.text
    assert seen["usage"]["completion_tokens"] == here.usage.completion_tokens
    assert seen["streamUsage"] == seen["usage"]
    assert (seen["refusal"]["kind"], seen["refusal"]["param"]) == (
        "BadRequestError",
        "frequency_penalty",
    )
    assert seen["response"] == "".join(seen["deltas"]) == here.text
    assert seen["models"] == ["dllm"]


QUESTIONS: Any = [
    {"type": "predicate", "instructions": "Is it blue?", "name": "blue"},
    {
        "type": "choice",
        "instructions": [{"type": "input_text", "text": "Which?"}],
        "choices": [{"value": True}, {"value": "true", "description": "the word"}],
    },
    {"type": "score", "instructions": "How good?", "levels": [{"label": "a"}, {"label": "bc"}]},
]


def test_decisions_equal_the_engine(client: OpenAI, llm: LLM) -> None:
    """OpenAI's client gets typed answers in order: those of `LLM.decide`, with usage."""
    part: Any = [{"type": "input_json", "data": {"sky": "blue"}}]
    decision = client.decisions.create(
        model="dllm", input=[{"role": "user", "content": part}], questions=QUESTIONS
    )
    asked = [QUESTIONS[0], QUESTIONS[1] | {"instructions": "Which?"}, QUESTIONS[2]]
    message = {"role": "user", "content": json.dumps({"sky": "blue"})}
    here = llm.decide([message], asked)
    assert [answer.to_dict() for answer in decision.answers] == here
    assert [answer.type for answer in decision.answers] == ["predicate", "choice", "score"]
    assert decision.usage.output_tokens == 0
    assert decision.usage.input_tokens == decision.usage.total_tokens > 0


@pytest.mark.parametrize(
    ("given", "questions", "named"),
    [
        ([{"role": "user", "content": [{"type": "input_image"}]}], QUESTIONS, "input_image"),
        ([{"type": "function_call", "call_id": "a"}], QUESTIONS, "function_call"),
        ("x", [{"type": "choice", "instructions": "?", "choices": [{"value": "a"}]}], "2 to 255"),
        ("x", [QUESTIONS[0] | {"levels": []}], "levels"),
        ("x", [QUESTIONS[0]] * 401, "400"),
        ("x" * 2000, [QUESTIONS[0]], "gen_length|at most"),
    ],
)
def test_decisions_that_cannot_be_made_are_refused(
    client: OpenAI, given: Any, questions: Any, named: str
) -> None:
    """A 400 with the name of the field, or of what is not supported, and the limit."""
    with pytest.raises(openai.BadRequestError, match=named):
        client.decisions.create(model="dllm", input=given, questions=questions)


def test_scores_equal_the_engine(adapter: AdapterServer, llm: LLM) -> None:
    """`POST /v1/score` has the estimates of `LLM.score`, one for each pair."""
    pairs = [["one", " two"], ["a b ", "c"]]
    body = {"model": "dllm", "pairs": pairs, "mc_num": 8, "seed": 3}
    answer = httpx.post(f"{adapter.url}/v1/score", json=body).json()
    here = llm.score([("one", " two"), ("a b ", "c")], mc_num=8, seed=3)
    assert answer["scores"] == [vars(score) for score in here]
    body["mc_num"] = 0
    refused = httpx.post(f"{adapter.url}/v1/score", json=body)
    assert refused.status_code == 400
    assert "mc_num" in refused.text
