"""The `dllm` command against a scripted server."""

import json
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import pytest
from client_fakes import Script, job, submitted
from dllm_client import Block, Client, Committed, Params, Step
from dllm_client.cli import options
from dllm_client.cli.live import canvas_lines
from typer.testing import CliRunner, Result

from launcher.program import app


@pytest.fixture
def dllm(script: Script, quick: None, monkeypatch: pytest.MonkeyPatch) -> "Dllm":
    del quick
    return Dllm(script, monkeypatch)


class Dllm:
    """Runs the command with the script in the server's place."""

    def __init__(self, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script = script

        def scripted(url: str, *, api_key: str | None, timeout: float) -> Client:
            transport = httpx.MockTransport(script)
            return Client(url, api_key=api_key, timeout=timeout, transport=transport)

        monkeypatch.setattr(options, "Client", scripted)

    def __call__(self, *arguments: str, stdin: str = "", url: str = "http://server") -> Result:
        return CliRunner().invoke(app, arguments, input=stdin, env={"DLLM_URL": url})

    @property
    def sent(self) -> dict[str, object]:
        fields: dict[str, object] = json.loads(self.script.requests[0].content)
        return fields


def test_generate_prints_the_text(dllm: Dllm) -> None:
    """Every option becomes the field of the API, and only the text is printed."""
    dllm.script.answers = [submitted(0), job("finished", "a text")]
    options = "--gen-length 64 --steps 32 --temperature 0.5 --seed 1 --block-length 16 --raw"
    options += " --remasking random --confidence-threshold 0.9 --cfg-scale 1.5 --stop x --stop y"
    outcome = dllm("generate", "hi", *options.split())
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "a text\n", "")
    assert dllm.sent == {
        "prompt": "hi",
        "gen_length": 64,
        "steps": 32,
        "temperature": 0.5,
        "seed": 1,
        "block_length": 16,
        "raw": True,
        "remasking": "random",
        "confidence_threshold": 0.9,
        "cfg_scale": 1.5,
        "stop": ["x", "y"],
    }


def test_generate_streams(dllm: Dllm) -> None:
    """Into a pipe, --stream prints text as it becomes final; with --json, event by event."""
    block = {"index": 0, "start": 0, "end": 2}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "steps": 2, "forward_passes": 2}
    usage["cached_tokens"] = 0
    step = {"step": 1, "block": block, "canvas": ["a", None], "committed": [], "final_text": "a"}
    step["seed"] = 7
    done = {"text": "ab", "finish_reason": "stop", "usage": usage, "seed": 7, "tokens": None}
    body = f"event: step\ndata: {json.dumps(step)}\n\nevent: done\ndata: {json.dumps(done)}\n\n"
    dllm.script.answers = [httpx.Response(200, content=body.encode())]

    outcome = dllm("generate", "hi", "--stream", "--priority", "1", "--timeout", "5")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "ab\n", "")
    assert dllm.sent == {"prompt": "hi", "priority": 1, "timeout": 5}
    printed = dllm("generate", "hi", "--stream", "--json").stdout.splitlines()
    assert [json.loads(line) for line in printed] == [step, done]
    assert dllm("generate", "hi", "--stream", "--wait-timeout", "5").exit_code == 2


def test_terminal_shows_the_canvas() -> None:
    """Masks are visible, what is new stands out, and nothing in it steers the terminal."""
    canvas = ["a", None, "b\x1b[2J"]
    step = Step(3, Block(0, 0, 3), canvas, [Committed(2, 7, "b\x1b[2J", 0.9)], "a")
    (line,), _ = canvas_lines(step, 20)
    assert line.plain == "a░b\N{REPLACEMENT CHARACTER}[2J"
    assert [(span.start, span.end, span.style) for span in line.spans] == [
        (1, 2, "dim"),
        (2, 7, "bold green"),
    ]


def test_the_live_view_keeps_words_whole() -> None:
    """A line ends at a space or a mask, never in a word, whose pieces may be several tokens."""
    canvas = [
        "The",
        " quick",
        " bro",
        "wn",
        None,
        None,
        "\n",
        "\n",
        " fox",
        None,
        "jump",
        "ed over",
    ]
    lines, current = canvas_lines(Step(1, Block(1, 9, 12), canvas, [], ""), 10)
    assert [line.plain for line in lines] == [
        "The quick ",
        "brown░░",
        "",
        " fox░",
        "jumped ",
        "over",
    ]
    assert current == 3
    assert all(line.cell_len <= 10 for line in lines)


def test_prompt_from_standard_input(dllm: Dllm) -> None:
    """`-` reads the prompt, without the newline that ends it."""
    dllm.script.answers = [submitted(3)]
    assert dllm("jobs", "submit", "-", stdin="two\nlines\n").stdout == "3\n"
    assert dllm.sent == {"prompt": "two\nlines"}


def test_json_output(dllm: Dllm) -> None:
    """--json prints the job as one JSON document."""
    dllm.script.answers = [job("finished", "é", 2, finish_reason="length")]
    printed = json.loads(dllm("jobs", "status", "2", "--json").stdout)
    expected = {"request_id": 2, "status": "finished", "text": "é", "error": None}
    assert {**expected, "finish_reason": "length"}.items() <= printed.items()


def test_result_without_text_prints_the_state(dllm: Dllm) -> None:
    """A job that is not finished shows its state and why."""
    dllm.script.answers = [job("running"), job("failed", error="out of luck")]
    assert dllm("jobs", "status", "0").stdout == "running\n"
    assert dllm("jobs", "status", "0").stdout == "failed: out of luck\n"


def test_result_waits(dllm: Dllm) -> None:
    """`wait` polls until the text is there."""
    dllm.script.answers = [job("running"), job("finished", "a text")]
    assert dllm("jobs", "wait", "0").stdout == "a text\n"


def test_every_field_of_a_request_is_an_option(dllm: Dllm) -> None:
    """`dllm` takes each field under the API's name, with its type, and sends it under that name."""
    given: dict[str, object] = {}
    arguments = []
    for name, kind in get_type_hints(Params).items():
        values: dict[Any, Any] = {str: "x", int: 3, float: 0.5, bool: True, list[str]: ["x"]}
        value = {**values, list[int]: [3], dict[str, Any]: {"regex": "a"}}[kind]
        text = json.dumps(value) if isinstance(value, dict) else value
        shown = [] if kind is bool else [str(text[0] if isinstance(text, list) else text)]
        arguments += [f"--{name.replace('_', '-')}", *shown]
        given[name] = value
    dllm.script.answers = [submitted(0)]
    assert dllm("jobs", "submit", "hi", *arguments).stdout == "0\n"
    assert dllm.sent == {"prompt": "hi", **given}


@pytest.mark.parametrize("behind", [False, True])
def test_the_address_may_stand_before_or_behind_the_command(dllm: Dllm, behind: bool) -> None:
    """--url works in both places, and wins over DLLM_URL."""
    dllm.script.answers = [httpx.Response(200, json={"status": "ok"})]
    address = ["--url", "http://other", "--api-key", "secret"]
    arguments = ["health", *address] if behind else [*address, "health"]
    assert dllm(*arguments).stdout == "ok\n"
    (request,) = dllm.script.requests
    assert (request.url.host, request.headers["Authorization"]) == ("other", "Bearer secret")


def test_zero_is_a_value(dllm: Dllm) -> None:
    """A number 0 that was given is sent; the server's default may be another."""
    dllm.script.answers = [submitted(0)]
    dllm("jobs", "submit", "hi", "--seed", "0", "--temperature", "0")
    assert dllm.sent == {"prompt": "hi", "seed": 0, "temperature": 0}


def test_set_sends_any_field(dllm: Dllm) -> None:
    """--set takes name=value, the value as JSON or else as text, and wins over the option."""
    dllm.script.answers = [submitted(0)]
    given = (
        "--set",
        "raw=false",
        "--set",
        "new-field=[1, 2]",
        "--set",
        "cache=dual=",
        "--steps",
        "4",
    )
    assert dllm("jobs", "submit", "hi", *given, "--set", "steps=8").exit_code == 0
    fields = {"raw": False, "new_field": [1, 2], "cache": "dual=", "steps": 8}
    assert dllm.sent == {"prompt": "hi", **fields}
    wrong = dllm("jobs", "submit", "hi", "--set", "steps")
    assert wrong.exit_code == 2
    assert "name=value" in wrong.stderr


def test_a_cut_answer_says_so(dllm: Dllm) -> None:
    """On stderr, so that the text alone is on stdout; --json has the reason in it instead."""
    dllm.script.answers = [submitted(0), job("finished", "a text", finish_reason="length")]
    outcome = dllm("generate", "hi")
    assert (outcome.exit_code, outcome.stdout) == (0, "a text\n")
    assert "cut at its length (finish_reason: length)" in outcome.stderr
    dllm.script.answers = [submitted(0), job("finished", "a text", finish_reason="length")]
    assert dllm("--json", "generate", "hi").stderr == ""


def stream(text: str, finish_reason: str = "stop") -> httpx.Response:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "steps": 2, "forward_passes": 2}
    done = {"text": text, "finish_reason": finish_reason, "usage": usage, "seed": 7}
    return httpx.Response(200, content=f"event: done\ndata: {json.dumps(done)}\n\n".encode())


def test_chat_keeps_the_turns(dllm: Dllm) -> None:
    """Each line of a pipe is a turn, with all turns before it; /new starts over, /quit ends."""
    dllm.script.answers = [stream("one"), stream("two"), stream("three", "length")]
    outcome = dllm("chat", "--system", "be brief", stdin="a\n\nb\n/new\nc\n/quit\nd\n")
    assert (outcome.exit_code, outcome.stdout) == (0, "one\ntwo\nthree\n")
    assert outcome.stderr.count("was cut") == 1
    sent = [json.loads(request.content)["messages"] for request in dllm.script.requests]
    system = {"role": "system", "content": "be brief"}
    first, second = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    answer = {"role": "assistant", "content": "one"}
    assert sent == [
        [system, first],
        [system, first, answer, second],
        [system, {"role": "user", "content": "c"}],
    ]


def test_chat_as_json(dllm: Dllm) -> None:
    """With --json each answer is one line, with its usage and seed."""
    dllm.script.answers = [stream("one")]
    (line,) = dllm("chat", "--json", stdin="a\n").stdout.splitlines()
    answer = json.loads(line)
    assert (answer["text"], answer["seed"], answer["usage"]["steps"]) == ("one", 7, 2)


def test_models(dllm: Dllm) -> None:
    """`models` prints a name a line, or a list."""
    dllm.script.answers = [httpx.Response(200, json={"data": [{"id": "dllm"}, {"id": "other"}]})]
    assert dllm("models").stdout == "dllm\nother\n"
    assert json.loads(dllm("models", "--json").stdout) == ["dllm", "other"]


def test_chat_messages_as_json(dllm: Dllm) -> None:
    """With --messages the prompt is a JSON list of messages; anything else is one line."""
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    dllm.script.answers = [submitted(3)]
    assert dllm("jobs", "submit", "-", "--messages", stdin=json.dumps(messages)).stdout == "3\n"
    assert dllm.sent == {"messages": messages}
    for wrong in ("hi", '{"role": "user"}', "[1]"):
        outcome = dllm("jobs", "submit", wrong, "--messages")
        assert outcome.exit_code == 1
        assert outcome.stderr.startswith("dllm: messages: ")


def test_interrupt_cancels_the_job(dllm: Dllm) -> None:
    """Ctrl-C cancels the job that the command waits for."""
    dllm.script.answers = [submitted(4), job("running"), KeyboardInterrupt(), job("cancelled")]
    outcome = dllm("generate", "hi")
    assert (outcome.exit_code, outcome.stdout) == (130, "")
    assert outcome.stderr == "dllm: cancelling job 4\n"
    assert dllm.script.asked[-1] == "DELETE /v1/result/4"


def test_interrupt_of_a_job_that_cannot_be_cancelled(dllm: Dllm) -> None:
    """Without a server, and at the second Ctrl-C, the id is there to cancel the job by later."""
    interrupted = [submitted(4), KeyboardInterrupt()]
    dllm.script.answers = [*interrupted, httpx.ConnectError("refused")]
    outcome = dllm("generate", "hi")
    assert outcome.exit_code == 130
    assert "dllm: job 4 may go on: cannot reach http://server: refused\n" in outcome.stderr

    dllm.script.answers = [*interrupted, KeyboardInterrupt()]
    outcome = dllm("generate", "hi")
    assert (outcome.exit_code, outcome.stderr) == (130, "dllm: cancelling job 4\n")


def test_interrupt_of_a_stream_hangs_up(dllm: Dllm) -> None:
    """Ctrl-C closes the connection of a stream, which has no job to cancel."""
    dllm.script.answers = [KeyboardInterrupt()]
    outcome = dllm("generate", "hi", "--stream")
    assert (outcome.exit_code, outcome.stderr) == (130, "")
    assert dllm.script.asked == ["POST /v1/generate/stream"]


def test_cancel_and_health(dllm: Dllm) -> None:
    """Both print one word."""
    dllm.script.answers = [job("cancelled"), httpx.Response(200, json={"status": "ok"})]
    assert dllm("jobs", "cancel", "0").stdout == "cancelled\n"
    assert dllm("health").stdout == "ok\n"


def test_errors_are_one_line(dllm: Dllm, tmp_path: Path) -> None:
    """An error is one line on stderr and exit code 1, never a traceback."""
    detail = [{"loc": ["body", "gen_length"], "msg": "should be\nless than [513]"}]
    dllm.script.answers = [httpx.Response(422, json={"detail": detail})]
    outcome = dllm("generate", "hi", "--gen-length", "9999")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr == "dllm: gen_length: should be less than [513]\n"

    dllm.script.answers = [httpx.ConnectError("refused")]
    outcome = dllm("health", url="http://elsewhere")
    assert outcome.stderr == "dllm: cannot reach http://elsewhere: refused\n"

    outcome = dllm("batch", str(tmp_path / "absent"))
    assert outcome.exit_code == 1
    assert "No such file" in outcome.stderr


def test_errors_of_the_waiting_name_the_job(dllm: Dllm) -> None:
    """An error while waiting names the job, so that the user can wait for it again."""
    for answer in (httpx.Response(401, json={"detail": "no key"}), job("failed", None, 0)):
        dllm.script.answers = [submitted(0), answer]
        outcome = dllm("generate", "hi")
        assert outcome.exit_code == 1
        assert outcome.stderr.startswith("dllm: job 0")
        assert outcome.stderr.count("job 0") == 1


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["generate", "hi", "--temperature", "nan"], "temperature"),
        (["generate", "\udcff"], "prompt"),
        (["generate", "\udcff", "--stream"], "prompt"),
        (["health", "--answer-timeout", "nan"], "timeout"),
        (["health", "--api-key", "schlüssel"], "api_key"),
        (["jobs", "submit", "hi", "--stop", "\udcff"], "stop"),
        (["generate", "[" * 100_000, "--messages"], "messages"),
    ],
)
def test_values_that_cannot_be_sent_are_one_line(
    dllm: Dllm, arguments: list[str], field: str
) -> None:
    """A value that no request can hold is an error of one line."""
    outcome = dllm(*arguments, stdin="one")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith(f"dllm: {field}: ")
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "hi", "--set", "prompt=1"],
        ["batch", "-", "--set", "in_flight=1"],
        ["generate", "hi", "--set", "self=1"],
        ["generate", "hi", "--wait-timeout", "nan"],
        ["generate", "hi", "--wait-timeout", "-1"],
    ],
)
def test_arguments_that_no_command_takes_exit_with_2(dllm: Dllm, arguments: list[str]) -> None:
    """A field that is an argument of its own, and a time that is none, are wrong arguments."""
    outcome = dllm(*arguments, stdin="one")
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert "Invalid value" in outcome.stderr
    assert dllm.script.requests == []
