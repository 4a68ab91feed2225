"""API keys: hashed, named, replaceable, and each for its own jobs."""

import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_fakes import (
    DONE,
    HANG,
    RunningApp,
    ScriptedEngine,
    fast_settings,
    running_app,
    until,
)

from adapter.app import create_app
from adapter.auth.keys import Keyring, entry_of, main, new_key
from adapter.errors import SettingsError

KEY, OTHER = new_key(), new_key()
ENTRIES = f"team:{entry_of('team', KEY).partition(':')[2]},guest:{entry_of('guest', OTHER)[6:]}"

Headers = dict[str, str]


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[RunningApp]:
    """A worker that admits two keys."""
    settings = fast_settings(database_url, api_keys=ENTRIES)
    async with running_app(settings, ScriptedEngine()) as running:
        yield running


def as_header(key: str) -> Headers:
    return {"X-API-Key": key}


async def submit(api: RunningApp, headers: Headers) -> httpx.Response:
    return await api.client.post("/v1/generate", json={"prompt": "a"}, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [as_header(KEY), {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer  {KEY}"}],
)
async def test_key_admits_in_either_header(api: RunningApp, headers: Headers) -> None:
    """A key may come as X-API-Key, or as a bearer token."""
    assert (await submit(api, headers)).status_code == 200


@pytest.mark.parametrize(
    ("settings", "salts"),
    [
        ({"api_keys": ENTRIES}, ["team", "guest", "team", "guest"]),
        ({"api_keys": ENTRIES, "share_prefixes": True}, [None] * 4),
        ({}, [None] * 4),
    ],
)
async def test_only_requests_of_one_key_share_cached_prefixes(
    database_url: str, settings: dict[str, Any], salts: list[str | None]
) -> None:
    """Jobs and OpenAI calls carry the name of their key as salt, unless keys share prefixes."""
    engine = ScriptedEngine()
    async with running_app(fast_settings(database_url, **settings), engine) as api:
        for number, key in enumerate((KEY, OTHER)):
            await submit(api, as_header(key))
            poll = f"/v1/result/{number}?wait=5"
            assert (await api.client.get(poll, headers=as_header(key))).json()["text"]
        for key in (KEY, OTHER):
            chat = {"model": "dllm", "messages": [{"role": "user", "content": "a"}]}
            answer = await api.client.post(
                "/v1/chat/completions", json=chat, headers=as_header(key)
            )
            assert answer.status_code == 200
    assert [inputs.get("cache_salt") for inputs in engine.requests] == salts


@pytest.mark.parametrize(
    "headers",
    [
        {},
        as_header(""),
        as_header("wrong"),
        as_header(KEY[:-1]),
        as_header(hashlib.sha256(KEY.encode()).hexdigest()),
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
    ],
)
async def test_no_key_is_401(api: RunningApp, headers: Headers) -> None:
    """A call without a key is told how to send one, and nothing of it is stored."""
    answer = await submit(api, headers)

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "X-API-Key" in answer.json()["detail"]
    assert (await submit(api, as_header(KEY))).json()["request_ids"] == [0]


@pytest.mark.parametrize("length", ["1", "99999999999"])
async def test_body_of_a_stranger_is_not_read(api: RunningApp, length: str) -> None:
    """Without a key the answer does not depend on what was sent."""
    headers = {"content-type": "application/json", "content-length": length}
    answer = await api.client.post("/v1/generate", content=b"{", headers=headers)

    assert answer.status_code == 401


async def test_every_route_of_the_api_asks_for_a_key(api: RunningApp) -> None:
    """No call below /v1 but health and liveness is answered without a key."""
    described = (await api.client.get("/openapi.json")).json()["paths"]
    open_to_all = {"/v1/health", "/v1/livez"}
    calls = [(verb, path) for path, verbs in described.items() for verb in verbs]
    assert len(calls) > len(open_to_all)
    for verb, path in calls:
        if path.startswith("/v1"):
            answer = await api.client.request(verb, path.replace("{request_id}", "0"))
            assert (answer.status_code == 401) == (path not in open_to_all), (verb, path)


async def test_prefix_of_a_proxy_opens_nothing(database_url: str) -> None:
    """Behind a proxy that adds a prefix to paths the same calls ask for a key."""
    app = create_app(
        fast_settings(database_url, api_keys=ENTRIES), engines={"engine:1": ScriptedEngine()}
    )
    transport = httpx.ASGITransport(app, root_path="/llm")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://adapter") as client,
    ):
        answers = [await client.get(path) for path in ("/llm/v1/result/0", "/v1/result/0")]
        assert [answer.status_code for answer in answers] == [401, 401]
        answer = await client.get("/llm/v1/result/0", headers=as_header(KEY))
        assert answer.status_code == 404


async def test_jobs_are_visible_to_their_owner_alone(api: RunningApp) -> None:
    """To another key a job is unknown, to look at and to cancel."""
    await submit(api, as_header(KEY))
    poll = "/v1/result/0?wait=5"
    for method in ("GET", "DELETE"):
        answer = await api.client.request(method, poll, headers=as_header(OTHER))
        assert answer.status_code == 404
    answer = await api.client.get(poll, headers=as_header(KEY))
    assert answer.json()["text"] == DONE.text


async def test_nobody_waits_for_the_jobs_of_others(database_url: str) -> None:
    """To another key a job that runs is unknown, too, and to its owner it is not."""
    settings = fast_settings(database_url, api_keys=ENTRIES)
    engine = ScriptedEngine([[HANG]])
    async with running_app(settings, engine) as api:
        await submit(api, as_header(KEY))
        await until(lambda: len(engine.requests) == 1)
        for key, status in ((OTHER, 404), (KEY, 200)):
            answer = await api.client.get("/v1/result/0?wait=0.05", headers=as_header(key))
            assert answer.status_code == status


async def test_metrics_are_open_unless_told_otherwise(database_url: str) -> None:
    """A setting has /metrics ask for a key like any call."""
    settings = fast_settings(database_url, api_keys=ENTRIES, metrics_need_key=True)
    async with running_app(settings, ScriptedEngine()) as api:
        for path in ("/metrics", "/metrics%0A"):
            assert (await api.client.get(path)).status_code == 401
            assert (await api.client.head(path)).status_code == 401
        answer = await api.client.get("/metrics", headers=as_header(KEY))
        assert answer.status_code != 401


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write the file of keys, as an editor does, and say where it is."""
    file = tmp_path / "keys"

    def write(text: str) -> Path:
        fresh = tmp_path / "fresh"
        fresh.write_text(text)
        os.replace(fresh, file)
        return file

    return write


def test_keys_are_replaced_without_a_restart(write: Callable[[str], Path]) -> None:
    """What the file says now is what counts; two keys of one name overlap."""
    keyring = Keyring(file=write(f"# ours\n{entry_of('team', KEY)}  # till May\n\n"))
    assert [keyring.name_of(KEY), keyring.name_of(OTHER)] == ["team", None]

    write(f"{entry_of('team', KEY)}\n{entry_of('team', OTHER)}\n")
    assert [keyring.name_of(KEY), keyring.name_of(OTHER)] == ["team", "team"]

    write(entry_of("team", OTHER))
    assert [keyring.name_of(KEY), keyring.name_of(OTHER)] == [None, "team"]

    write("")
    assert keyring.required
    assert keyring.name_of(OTHER) is None


def test_broken_file_leaves_the_keys_as_they_were(
    write: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A keys file with a mistake changes no access; the log reports it once."""
    keyring = Keyring(file=write(entry_of("team", KEY)))
    file = write(f"{entry_of('team', OTHER)}\nteam {KEY}\n")
    for _ in range(3):
        assert [keyring.name_of(KEY), keyring.name_of(OTHER)] == ["team", None]
    assert caplog.text.count("api_keys_not_read") == 1
    assert "entry 2 must be name:hash" in caplog.text

    file.unlink()
    for _ in range(3):
        assert keyring.name_of(KEY) == "team"
    assert caplog.text.count("api_keys_not_read") == 2
    assert KEY not in caplog.text

    write(entry_of("team", OTHER))
    assert [keyring.name_of(KEY), keyring.name_of(OTHER)] == [None, "team"]


def test_no_keys_admit_everybody() -> None:
    """Without any key in the settings none is asked for."""
    assert not Keyring("").required
    assert Keyring(ENTRIES).required


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(KEY, id="the key itself"),
        pytest.param(f"team:{KEY}", id="a name and the key itself"),
        "team:",
        f"a b:{'0' * 64}",
        f":{'0' * 64}",
    ],
)
def test_nonsense_stops_the_start_without_being_shown(entry: str) -> None:
    """What is no name and hash is refused by its place; it may be a key."""
    with pytest.raises(SettingsError, match="DLLM_API_KEYS: entry 2 must be name:hash") as caught:
        Keyring(f"{entry_of('team', KEY)},{entry}")
    assert KEY not in str(caught.value)


def test_missing_file_stops_the_start(tmp_path: Path) -> None:
    """A file that is not there is a mistake, not an open door."""
    with pytest.raises(SettingsError, match="DLLM_API_KEYS_FILE"):
        Keyring(file=tmp_path / "none")


def test_command_makes_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a key and keeps only its hash; each key is another."""
    file = tmp_path / "keys"
    main(["new", "team", "--file", str(file)])
    first = capsys.readouterr().out.strip()
    command = [sys.executable, "-m", "adapter.auth.keys", "new", "guest"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    second = shown.stdout.strip()

    assert Keyring(file=file).name_of(first) == "team"
    assert first not in file.read_text()
    assert Keyring(shown.stderr.splitlines()[-1]).name_of(second) == "guest"
    with pytest.raises(SystemExit):
        main(["new", "no name"])


def test_an_entry_is_appended_on_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file whose last line was not ended keeps its entries apart, and both keys work."""
    file = tmp_path / "keys"
    file.write_text(entry_of("first", "k1"))
    main(["new", "second", "--file", str(file)])
    keyring = Keyring(file=file)
    assert keyring.name_of("k1") == "first"
    assert keyring.name_of(capsys.readouterr().out.strip()) == "second"
