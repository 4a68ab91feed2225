"""The `dllm` command against a scripted server."""

import json
from pathlib import Path
from typing import get_type_hints

import httpx
import pytest
from client_fakes import BatchServer, Script, job, submitted
from dllm_client import Block, Client, Committed, Params, Step, _options
from dllm_client._watch import canvas
from dllm_client.cli import app
from typer.testing import CliRunner, Result


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

        monkeypatch.setattr(_options, "Client", scripted)

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
    done = {"text": "ab", "finish_reason": "stop", "usage": usage, "seed": 7}
    body = f"event: step\ndata: {json.dumps(step)}\n\nevent: done\ndata: {json.dumps(done)}\n\n"
    dllm.script.answers = [httpx.Response(200, content=body.encode())]

    outcome = dllm("generate", "hi", "--stream", "--priority", "1", "--timeout", "5")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "ab\n", "")
    assert dllm.sent == {"prompt": "hi", "priority": 1, "timeout": 5}
    printed = dllm("generate", "hi", "--stream", "--json").stdout.splitlines()
    assert [json.loads(line) for line in printed] == [step, done]
    assert dllm("generate", "hi", "--stream", "--wait-timeout", "5").exit_code == 2


def test_terminal_shows_the_canvas() -> None:
    """Masks are visible, and what is new stands out."""
    step = Step(3, Block(0, 0, 3), ["a", None, "b"], [Committed(2, 7, "b", 0.9)], "a")
    shown = canvas(step)
    assert shown.plain == "a░b"
    assert [(span.start, span.end, span.style) for span in shown.spans] == [
        (1, 2, "dim"),
        (2, 3, "bold green"),
    ]


def test_prompt_from_standard_input(dllm: Dllm) -> None:
    """`-` reads the prompt, without the newline that ends it."""
    dllm.script.answers = [submitted(3)]
    assert dllm("submit", "-", stdin="two\nlines\n").stdout == "3\n"
    assert dllm.sent == {"prompt": "two\nlines"}


def test_json_output(dllm: Dllm) -> None:
    """--json prints the job as one JSON document."""
    dllm.script.answers = [job("finished", "é", 2, finish_reason="length")]
    printed = json.loads(dllm("result", "2", "--json").stdout)
    expected = {"request_id": 2, "status": "finished", "text": "é", "error": None}
    assert {**expected, "finish_reason": "length"}.items() <= printed.items()


def test_result_without_text_prints_the_state(dllm: Dllm) -> None:
    """A job that is not finished shows its state and why."""
    dllm.script.answers = [job("running"), job("failed", error="out of luck")]
    assert dllm("result", "0").stdout == "running\n"
    assert dllm("result", "0").stdout == "failed: out of luck\n"


def test_result_waits(dllm: Dllm) -> None:
    """--wait polls until the text is there."""
    dllm.script.answers = [job("running"), job("finished", "a text")]
    assert dllm("result", "0", "--wait").stdout == "a text\n"


def test_batch_goes_on_after_a_failure(dllm: Dllm, tmp_path: Path) -> None:
    """Each line that is not blank is a prompt; one failed job makes the exit code 1."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    failed = job("failed", None, 0, error="out of luck")
    dllm.script.answers = [submitted(0, 1), failed, job("finished", "b", 1)]
    outcome = dllm("batch", str(prompts), "--gen-length", "8")
    assert (outcome.exit_code, outcome.stdout) == (1, "failed: out of luck\nb\n")
    assert outcome.stderr == "dllm: job 0 failed: out of luck\n"
    assert dllm.sent == {"prompts": ["one", "two"], "gen_length": 8}


def test_batch_has_one_timeout(dllm: Dllm) -> None:
    """--wait-timeout is the time for all jobs, not for each of them, as in `generate_batch`."""
    dllm.script.answers = [submitted(4, 5), job("finished", "a", 4), job("running")]
    outcome = dllm("batch", "-", "--wait-timeout", "0.05", stdin="one\ntwo\n")
    assert (outcome.exit_code, outcome.stdout) == (1, "a\n")
    assert outcome.stderr.startswith("dllm: job 5 was not finished after ")
    assert float(outcome.stderr.split()[7]) <= 0.05


def test_batch_longer_than_the_servers_limit(dllm: Dllm) -> None:
    """100 lines go out in calls that the server takes, and come back in their order."""
    server = BatchServer(limit=30)
    dllm.script.answers = [server]
    outcome = dllm("batch", "-", stdin="".join(f"{i}\n" for i in range(100)))
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert outcome.stdout.split() == [f"answer-{i}" for i in range(100)]
    assert server.calls == [30, 30, 30, 10]


def test_every_field_of_a_request_is_an_option(dllm: Dllm) -> None:
    """`dllm` takes each field under the API's name, with its type, and sends it under that name."""
    given: dict[str, object] = {}
    arguments = []
    for name, kind in get_type_hints(Params).items():
        value = {str: "x", int: 3, float: 0.5, bool: True, list[str]: ["x"], list[int]: [3]}[kind]
        shown = [] if kind is bool else [str(value[0] if isinstance(value, list) else value)]
        arguments += [f"--{name.replace('_', '-')}", *shown]
        given[name] = value
    dllm.script.answers = [submitted(0)]
    assert dllm("submit", "hi", *arguments).stdout == "0\n"
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


def test_chat_messages_as_json(dllm: Dllm) -> None:
    """With --messages the prompt is a JSON list of messages; anything else is one line."""
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    dllm.script.answers = [submitted(3)]
    assert dllm("submit", "-", "--messages", stdin=json.dumps(messages)).stdout == "3\n"
    assert dllm.sent == {"messages": messages}
    for wrong in ("hi", '{"role": "user"}', "[1]"):
        outcome = dllm("submit", wrong, "--messages")
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


def test_interrupt_cancels_what_is_left_of_a_batch(dllm: Dllm) -> None:
    """The jobs that are done keep their texts; the others are cancelled."""
    done = job("finished", "a", 4)
    dllm.script.answers = [submitted(4, 5, 6), done, KeyboardInterrupt(), job("cancelled")]
    outcome = dllm("batch", "-", stdin="one\ntwo\nthree\n")
    assert (outcome.exit_code, outcome.stdout) == (130, "a\n")
    assert dllm.script.asked[-2:] == ["DELETE /v1/result/5", "DELETE /v1/result/6"]


def test_interrupt_of_a_stream_hangs_up(dllm: Dllm) -> None:
    """Ctrl-C closes the connection of a stream, which has no job to cancel."""
    dllm.script.answers = [KeyboardInterrupt()]
    outcome = dllm("generate", "hi", "--stream")
    assert (outcome.exit_code, outcome.stderr) == (130, "")
    assert dllm.script.asked == ["POST /v1/generate/stream"]


def test_cancel_and_health(dllm: Dllm) -> None:
    """Both print one word."""
    dllm.script.answers = [job("cancelled"), httpx.Response(200, json={"status": "ok"})]
    assert dllm("cancel", "0").stdout == "cancelled\n"
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
        (["batch", "-", "--stop", "\udcff"], "stop"),
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
