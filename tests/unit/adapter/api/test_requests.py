"""What bodies of jobs become at the engine, and which are refused, through the front door."""

import json
from typing import Any

import pytest
from adapter_fakes import (
    RunningApp,
    ScriptedEngine,
    fast_settings,
    running_app,
)


async def error_responses(api: RunningApp, path: str, body: Any) -> list[tuple[str, str]]:
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"content-type": "application/json"}
    answer = await api.client.post(path, content=content, headers=headers)
    assert answer.status_code == 422, answer.text
    return [(".".join(map(str, item["loc"])), item["msg"]) for item in answer.json()["detail"]]


async def test_prompt_is_one_user_message(api: RunningApp, engine: ScriptedEngine) -> None:
    """A prompt goes to the engine as a chat of one message, for its template to render."""
    await api.result(await api.submit("hi"))

    assert engine.requests == [
        {"temperature": 0.0, "gen_length": 32, "messages": '[{"role": "user", "content": "hi"}]'}
    ]


async def test_raw_prompt_is_passed_as_it_is(api: RunningApp, engine: ScriptedEngine) -> None:
    """With raw, the engine gets the text itself."""
    await api.result(await api.submit("hi", raw=True))

    assert engine.requests == [{"temperature": 0.0, "gen_length": 32, "text_input": "hi"}]


async def test_every_option_reaches_the_engine(api: RunningApp, engine: ScriptedEngine) -> None:
    """Each optional field becomes the input of that name; one that is null is left out."""
    options = {
        "temperature": 1.5,
        "gen_length": 64,
        "steps": 16,
        "block_length": 16,
        "cfg_scale": 1,
        "remasking": "random",
        "confidence_threshold": 0.9,
        "factor": 1.5,
        "entropy_bound": 0.25,
        "low_threshold": 0.5,
        "anchor_threshold": 0.75,
        "neighbor_threshold": 0.5,
        "alg": "entropy",
        "alg_temp": 0.5,
        "logits_eos_inf": True,
        "confidence_eos_eot_inf": True,
        "suffix": "the end",
        "canvas_ids": [1, 2, 3],
        "top_p": 0.5,
        "top_k": 4,
        "seed": -(2**63),
        "stop": ["a", "b"],
        "cache": "dual",
        "retention_ratio": 0.5,
        "ignore_eos": True,
    }
    body = {"input_ids": [1, 2], "prompt": None, **options}
    answer = await api.client.post("/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    await api.result(0)

    assert [{"input_ids": [1, 2], **options}] == engine.requests


async def test_a_prompt_without_ids_reaches_the_engine(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """`input_ids: []` asks for a text from nothing: the engine gets the input with no ids."""
    answer = await api.client.post("/v1/generate", json={"input_ids": [], "gen_length": 8})
    assert answer.status_code == 200, answer.text
    await api.result(0)

    assert engine.requests == [{"temperature": 0.0, "gen_length": 8, "input_ids": []}]


async def test_canvas_says_how_long_it_is(api: RunningApp, engine: ScriptedEngine) -> None:
    """A canvas without gen_length has its own length, not the default one."""
    await api.result(await api.submit(canvas_ids=[5, 6, 7]))

    assert engine.requests[0]["gen_length"] == 3


async def test_block_fits_the_canvas(api: RunningApp, engine: ScriptedEngine) -> None:
    """A block may be as long as the canvas, whichever of the two fields says how long that is."""
    await api.result(await api.submit(canvas_ids=[5] * 64, block_length=64))
    assert engine.requests[0]["block_length"] == 64

    long = {"prompt": "a", "canvas_ids": [5] * 3, "block_length": 4}
    ((where, why),) = await error_responses(api, "/v1/generate", long)
    assert where == "body.block_length"
    assert "less than or equal to 3" in why


async def test_single_stop_string(api: RunningApp, engine: ScriptedEngine) -> None:
    """One stop string may stand without a list."""
    await api.result(await api.submit(stop="END"))

    assert engine.requests[0]["stop"] == ["END"]


@pytest.mark.parametrize(
    ("body", "loc", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "x" * 4097}, "prompt", "at most 4096 characters"),
        ({"prompt": 7}, "prompt", "valid string"),
        ({"prompt": "a\x00b"}, "prompt", "NUL"),
        ('{"prompt": "\\ud800"}', "prompt", "unicode"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages.0.content", "unicode"),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ('{"prompt": "a", "temperature": NaN}', "temperature", "finite"),
        ('{"prompt": "a", "cfg_scale": Infinity}', "cfg_scale", "finite"),
        ('{"prompt": "a", "temperature": 1e999}', "temperature", "finite"),
        ({"prompt": "a", "temperature": True}, "temperature", "valid number"),
        ({"prompt": "a", "gen_length": 0}, "gen_length", "greater than or equal to 1"),
        ({"prompt": "a", "gen_length": 513}, "gen_length", "less than or equal to 512"),
        ({"prompt": "a", "canvas_ids": [1] * 513}, "canvas_ids", "at most 512 items"),
        ({"prompt": "a", "suffix": "x" * 4097}, "suffix", "at most 4096 characters"),
        ({"prompt": "a", "factor": -1}, "factor", "greater than or equal to 0"),
        ({"prompt": "a", "gen_length": True}, "gen_length", "valid integer"),
        ({"prompt": "a", "gen_length": "32"}, "gen_length", "valid integer"),
        ({"prompt": "a", "gen_length": 1.5}, "gen_length", "valid integer"),
        ({"prompt": "a", "steps": 0}, "steps", "greater than or equal to 1"),
        ({"prompt": "a", "block_length": 0}, "block_length", "greater than or equal to 1"),
        ({"prompt": "a", "block_length": 33}, "block_length", "less than or equal to 32"),
        ({"prompt": "a", "cfg_scale": -1}, "cfg_scale", "greater than or equal to 0"),
        ({"prompt": "a", "confidence_threshold": 0}, "confidence_threshold", "greater than 0"),
        ({"prompt": "a", "confidence_threshold": 1.1}, "confidence_threshold", "equal to 1"),
        ({"prompt": "a", "timeout": 0}, "timeout", "greater than 0"),
        ({"prompt": "a", "timeout": 86401}, "timeout", "less than or equal to 86400"),
        ({"prompt": "a", "priority": 0}, "priority", "greater than or equal to 1"),
        ({"prompt": "a", "priority": 4}, "priority", "less than or equal to 3"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "top_k": 0}, "top_k", "greater than or equal to 1"),
        ({"prompt": "a", "retention_ratio": 2}, "retention_ratio", "less than or equal to 1"),
        ({"prompt": "a", "seed": 2**63}, "seed", "less than or equal to 9223372036854775807"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop.1", "at least 1 character"),
        ({"prompt": "a", "stop": "x" * 257}, "stop.0", "at most 256 characters"),
        ({"prompt": "a", "max_tokens": 3}, "max_tokens", "Extra inputs are not permitted"),
        ({"prompt": "a", "\u2028": 3}, "\u2028", "Extra inputs are not permitted"),
        ({"input_ids": [1, -1]}, "input_ids.1", "greater than or equal to 0"),
        ({"input_ids": [1] * 4097}, "input_ids", "at most 4096 items"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        (
            {"messages": [{"role": "user", "content": "x" * 1366}] * 3},
            "messages",
            "at most 4096 characters",
        ),
    ],
)
async def test_bad_value_is_422_naming_field_and_limit(
    api: RunningApp, body: Any, loc: str, message: str
) -> None:
    """A value out of bounds is refused with the field's name and the limit."""
    ((where, why),) = await error_responses(api, "/v1/generate", body)

    assert f"body.{loc}" == where
    assert message in why


async def test_a_chat_may_have_as_many_characters_as_the_limit_says(api: RunningApp) -> None:
    """Only characters count towards the limit of characters; messages have the same limit."""
    for chat, status in (
        ([{"role": "user", "content": "x" * 4096}], 200),
        ([{"role": "user", "content": "x" * 2048}] * 2, 200),
        ([{"role": "user", "content": ""}] * 4097, 422),
    ):
        answer = await api.client.post("/v1/generate", json={"messages": chat})
        assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    ("body", "given"),
    [
        ({}, "none"),
        ({"prompt": None}, "none"),
        ({"prompt": "a", "input_ids": [1]}, "prompt and input_ids"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt and messages"),
    ],
)
async def test_exactly_one_prompt(api: RunningApp, body: Any, given: str) -> None:
    """Prompt, messages and input_ids exclude one another, and the answer says so."""
    ((where, why),) = await error_responses(api, "/v1/generate", body)

    assert where == "body"
    expected = f"Exactly one of prompt, messages, input_ids should be given, not {given}"
    assert expected == why


async def test_raw_goes_with_a_prompt_only(api: RunningApp) -> None:
    """Raw means nothing for token ids, so it is refused rather than ignored."""
    ((_, why),) = await error_responses(api, "/v1/generate", {"input_ids": [1], "raw": True})

    assert why == "raw should be given together with prompt only"


@pytest.mark.parametrize(
    ("body", "loc", "message"),
    [
        ({}, "prompts", "required"),
        ({"prompts": []}, "prompts", "at least 1 item"),
        ({"prompts": ["a"] * 65}, "prompts", "at most 64 items"),
        ({"prompts": ["a", ""]}, "prompts.1", "at least 1 character"),
        ({"prompts": ["a", "x" * 4097]}, "prompts.1", "at most 4096 characters"),
        ({"prompts": ["a"], "gen_length": 513}, "gen_length", "less than or equal to 512"),
        ({"prompts": ["a"], "prompt": "a"}, "prompt", "Extra inputs are not permitted"),
    ],
)
async def test_bad_batch_leaves_no_job(api: RunningApp, body: Any, loc: str, message: str) -> None:
    """One bad prompt refuses the whole batch."""
    ((where, why),) = await error_responses(api, "/v1/generate_batch", body)

    assert f"body.{loc}" == where
    assert message in why
    assert await api.submit() == 0


async def test_all_excesses_are_named_at_once(api: RunningApp) -> None:
    """A request that exceeds several limits learns of all of them."""
    body = {"prompt": "x" * 4097, "temperature": 3, "gen_length": 600}

    where = [loc for loc, _ in await error_responses(api, "/v1/generate", body)]
    assert where == ["body.prompt", "body.temperature", "body.gen_length"]


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"null", b"", b"\xff", b'{"\\ud800": 1, "prompt": "a"}', b"[" * 100_000],
)
async def test_malformed_body_is_a_client_error(api: RunningApp, content: bytes) -> None:
    """Whatever the bytes, the answer is a 4xx."""
    answer = await api.client.post(
        "/v1/generate", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)


async def test_limits_are_settings(database_url: str) -> None:
    """Every limit can be moved in both directions."""
    settings = fast_settings(
        database_url, max_prompt_chars=5000, max_gen_length=8, max_temperature=0.5, max_batch_size=1
    )
    async with running_app(settings, ScriptedEngine()) as api:
        assert await api.submit("x" * 5000, gen_length=8, temperature=0.5) == 0
        body = {"prompts": ["a", "b"], "gen_length": 9, "temperature": 0.6}
        where = [loc for loc, _ in await error_responses(api, "/v1/generate_batch", body)]
        assert where == ["body.prompts", "body.temperature", "body.gen_length"]
