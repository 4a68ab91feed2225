"""`Client.map` and `dllm batch` against a scripted server."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from client_fakes import BatchServer, Script, job, submitted
from dllm_client import (
    AsyncClient,
    BadRequestError,
    Client,
    JobFailedError,
    Request,
    UnavailableError,
)
from dllm_client.cli import options
from typer.testing import CliRunner, Result

from launcher.program import app


def connected(server: object, kind: type = Client) -> Client:
    transport = httpx.MockTransport(server)  # type: ignore[arg-type]
    return kind("http://server", transport=transport)


def endless(seen: list[int]) -> Iterator[str]:
    for i in itertools.count():
        seen.append(i)
        yield f"p{i}"


def test_map_reads_no_further_than_what_is_in_flight(quick: None) -> None:
    """`map` reads as many items ahead as may be in flight; closing it cancels their jobs."""
    del quick
    server, seen = BatchServer(limit=1), []
    answers = connected(server).map(endless(seen), in_flight=5, gen_length=8)
    assert [next(answers).text for _ in range(3)] == ["answer-p0", "answer-p1", "answer-p2"]
    assert len(seen) == 7
    answers.close()
    assert server.cancelled == [3, 4, 5, 6]
    assert server.bodies[0] == {"prompt": "p0", "gen_length": 8}


def test_map_gives_each_item_its_own_fields_and_errors(quick: None) -> None:
    """A refused item and one that could not be read get errors in their places; others go on."""
    del quick
    server = BatchServer(limit=1, bad="bad")
    unread = BadRequestError("not JSON", 400)
    items = ["a", "bad", Request("b", {"seed": 0}), unread, "c"]
    outcomes = list(connected(server).map(items, seed=1))
    assert [one.index for one in outcomes] == [0, 1, 2, 3, 4]
    assert [one.error is None for one in outcomes] == [True, False, True, False, True]
    assert outcomes[3].error is unread
    with pytest.raises(BadRequestError, match="is bad"):
        _ = outcomes[1].text
    assert [body["seed"] for body in server.bodies] == [1, 1, 0, 1]


def test_an_item_that_is_no_prompt_ends_nothing(quick: None) -> None:
    """None in a list, as for an empty cell of a table, is sent as it is; the others go on."""
    del quick
    refused = httpx.Response(422, json={"detail": "not a prompt"})
    script = Script([refused, submitted(0), job("finished", "a", 0)])
    outcomes = list(connected(script).map([None, "a"], in_flight=1))  # type: ignore[list-item]
    assert [one.error is None for one in outcomes] == [False, True]
    assert outcomes[1].text == "a"


def test_a_failed_job_is_an_outcome(quick: None) -> None:
    """The outcome of a failed job has both the job and the error."""
    del quick
    script = Script([submitted(0), job("failed", None, 0, error="bad luck")])
    (outcome,) = connected(script).map(["a"])
    assert isinstance(outcome.error, JobFailedError)
    assert outcome.result is not None
    assert outcome.result.error == "bad luck"


def test_map_waits_where_the_service_has_no_room(quick: None) -> None:
    """With room for two jobs, `map` takes answers before it submits more, and loses none."""
    del quick
    server = BatchServer(limit=1, room=2)
    texts = [one.text for one in connected(server).map(map(str, range(20)))]
    assert texts == [f"answer-{i}" for i in range(20)]


def test_map_raises_what_concerns_every_item(quick: None) -> None:
    """Without a service `map` raises, so that no item is marked as failed."""
    del quick
    script = Script([submitted(0), httpx.ConnectError("refused")])
    with pytest.raises(UnavailableError):
        list(connected(script).map(["a", "b"]))


async def test_map_async(quick: None) -> None:
    """The asyncio client yields the same outcomes."""
    del quick
    server = BatchServer(limit=1, bad="bad")
    client = connected(server, AsyncClient)
    outcomes = [one async for one in client.map(["a", "bad", "b"], in_flight=2)]
    assert [one.text for one in outcomes if one.error is None] == ["answer-a", "answer-b"]


@pytest.fixture
def server() -> BatchServer:
    return BatchServer(limit=1, bad="bad")


@pytest.fixture
def dllm(server: BatchServer, quick: None, monkeypatch: pytest.MonkeyPatch) -> "Dllm":
    del quick
    return Dllm(server, monkeypatch)


class Dllm:
    """Runs the command with a scripted server."""

    def __init__(self, server: object, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server

        def scripted(url: str, *, api_key: str | None, timeout: float) -> Client:
            transport = httpx.MockTransport(self.server)  # type: ignore[arg-type]
            return Client(url, api_key=api_key, timeout=timeout, transport=transport)

        monkeypatch.setattr(options, "Client", scripted)

    def __call__(self, *arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(app, arguments, input=stdin)


def answers(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batch_of_json_lines(dllm: Dllm, server: BatchServer, tmp_path: Path) -> None:
    """Each line has its prompt, its fields and its id; a bad line has an error in its place."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "a", "id": "x", "seed": 3}, "bad", "b", {"seed": 3}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{nonsense\n\n")
    outcome = dllm("batch", str(source), str(out), "--gen-length", "8", "--seed", "0")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert [(one["line"], one.get("text")) for one in answers(out)] == [
        (1, "answer-a"),
        (2, None),
        (3, "answer-b"),
        (4, None),
        (5, None),
    ]
    assert answers(out)[0]["id"] == "x"
    errors = [str(one["error"]) for one in answers(out)]
    assert errors[0] == errors[2] == "None"
    for error, said in zip(errors[1::2], ("is bad", "must have one of prompt"), strict=True):
        assert said in error
    assert "not JSON" in errors[4]
    assert [body["seed"] for body in server.bodies] == [3, 0, 0]
    assert outcome.stderr.count("dllm: line") == 3


def test_batch_goes_on_where_it_ended(dllm: Dllm, server: BatchServer, tmp_path: Path) -> None:
    """A second run keeps complete answers, cuts off half a line, and asks only for the rest."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'"p{i}"\n' for i in range(10)))
    assert dllm("batch", str(source), str(out)).exit_code == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][:7])
    server.bodies.clear()
    assert dllm("batch", str(source), str(out)).exit_code == 0
    assert [one["line"] for one in answers(out)] == list(range(1, 11))
    assert [body["prompt"] for body in server.bodies] == [f"p{i}" for i in range(4, 10)]
    server.bodies.clear()
    assert dllm("batch", str(source), str(out)).exit_code == 0
    assert server.bodies == []


@pytest.mark.parametrize(
    ("old", "said"),
    [
        (None, "belongs to another input than line 2"),
        ("text\n", "something else"),
        ("one line without an end", "something else"),
        ('{"line": 1, "key": "k"}\nnotes', "something else"),
    ],
)
def test_batch_does_not_mix_answers(dllm: Dllm, tmp_path: Path, old: str | None, said: str) -> None:
    """Answers of another input, and any other file, stay as they are."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"a"\n"b"\n')
    if old is None:
        dllm("batch", str(source), str(out))
        source.write_text('"a"\n"c"\n')
    else:
        out.write_text(old)
    before = out.read_bytes()
    outcome = dllm("batch", str(source), str(out))
    assert outcome.exit_code == 1
    assert said in outcome.stderr
    assert out.read_bytes() == before


def test_lines_that_no_request_or_file_can_hold(dllm: Dllm, tmp_path: Path) -> None:
    """JSON that is nested too deep, and half a character, are errors of their lines."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    half = '{"prompt": "a", "id": ["\\ud800"]}'
    source.write_text(f'"a"\n{"[" * 100_000}\n{half}\n"b"\n')
    assert dllm("batch", str(source), str(out)).exit_code == 1
    errors = [str(one["error"]) for one in answers(out)]
    assert [error.partition(":")[0] for error in errors] == ["None", "not JSON", "id", "None"]
    source.write_bytes("café".encode("latin-1"))
    outcome = dllm("batch", str(source))
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert outcome.stderr.startswith(f"dllm: {source}: must be UTF-8")


def test_batch_of_plain_lines(dllm: Dllm, tmp_path: Path) -> None:
    """Lines of any other file are prompts; texts are printed, or with --json whole answers."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\nbad\ntwo\n")
    outcome = dllm("batch", str(prompts))
    assert (outcome.exit_code, outcome.stdout) == (1, "answer-one\n\nanswer-two\n")
    assert outcome.stderr.startswith("dllm: line 3: prompts.0: is bad")
    printed = dllm("batch", "-", "--json", stdin="one\n").stdout
    assert json.loads(printed)["text"] == "answer-one"


def test_interrupt_cancels_what_is_left_of_a_batch(dllm: Dllm) -> None:
    """The jobs that are done keep their texts; the others are cancelled."""
    script = Script([submitted(4), submitted(5), submitted(6), job("finished", "a", 4)])
    script.answers += [KeyboardInterrupt(), job("cancelled")]
    dllm.server = script
    outcome = dllm("batch", "-", stdin="one\ntwo\nthree\n")
    assert (outcome.exit_code, outcome.stdout) == (130, "a\n")
    assert script.asked[-2:] == ["DELETE /v1/result/5", "DELETE /v1/result/6"]
