"""The client library and its command line against the live servers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dllm_client import (
    Answer,
    AsyncClient,
    BadRequestError,
    Block,
    Client,
    JobCancelledError,
    JobFailedError,
    NotFoundError,
    Step,
    UnavailableError,
)
from dllm_client.triton import TritonClient

from launcher.ports import free_port
from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import generate
from tests.support.checkpoints import BOS
from tests.support.servers import AdapterServer, eventually


@pytest.fixture
def client(adapter: AdapterServer) -> Client:
    """The blocking client."""
    return Client(adapter.url)


def test_a_prompt_without_ids_is_a_text_from_nothing(client: Client) -> None:
    """No ids stand for the checkpoint's start token, through client, adapter and engine."""
    sampling = {"gen_length": 8, "seed": 3, "temperature": 1.0}
    assert client.generate([], **sampling) == client.generate([BOS], **sampling)


def test_generate(client: Client, adapter: AdapterServer) -> None:
    """`generate` and `generate_batch` return the texts of the jobs, in the order of the prompts."""
    prompts = ["one", "two", "three"]
    jobs = adapter.submit_batch(prompts, gen_length=16)
    expected = [adapter.finished(job) for job in jobs]
    assert client.generate("one", gen_length=16) == expected[0]
    assert client.generate_batch(prompts, gen_length=16) == expected


def test_batch_longer_than_the_servers_limit(client: Client) -> None:
    """`generate_batch` splits what the server takes in several calls only; messages work, too."""
    prompts = [f"What is {i % 7} + 1?" for i in range(65)]
    with pytest.raises(BadRequestError, match="at most 64 items"):
        client.submit_batch(prompts, gen_length=4)
    answers = client.generate_batch(prompts, gen_length=4, steps=1)
    assert answers == answers[:7] * 9 + answers[:2]
    messages = [{"role": "user", "content": prompts[1]}]
    assert client.generate(messages, gen_length=4, steps=1) == answers[1]


async def test_generate_async(client: Client, adapter: AdapterServer) -> None:
    """The asyncio client does the same."""
    async with AsyncClient(adapter.url) as other:
        assert await other.health() == "ok"
        assert await other.generate("one", gen_length=16) == client.generate("one", gen_length=16)


def test_stream(client: Client, adapter: AdapterServer) -> None:
    """`stream` yields a step for each denoising step, then the answer that `generate` returns."""
    *steps, answer = client.stream("one", gen_length=16, ignore_eos=True)
    assert isinstance(answer, Answer)
    assert answer.text == client.generate("one", gen_length=16, ignore_eos=True)
    committed = [one for step in steps if isinstance(step, Step) for one in step.committed]
    assert sorted(one.position for one in committed) == list(range(16))
    printed = dllm(adapter, "generate", "one", "--gen-length", "16", "--stream").stdout
    assert printed == client.generate("one", gen_length=16) + "\n"


def test_cancel(client: Client) -> None:
    """`cancel` ends a job and every wait for it."""
    job = client.submit("long", gen_length=512, cfg_scale=1.0, ignore_eos=True)
    assert client.cancel(job).status == "cancelled"
    with pytest.raises(JobCancelledError):
        client.wait(job)


def test_errors(client: Client) -> None:
    """Each failure has an error class of its own, which names the field at fault."""
    with pytest.raises(BadRequestError, match="512") as refused:
        client.generate("x", gen_length=513)
    assert refused.value.field == "gen_length"
    with pytest.raises(BadRequestError, match="low_confidence") as refused:
        client.generate("x", remasking="best")
    assert refused.value.field == "remasking"
    with pytest.raises(JobFailedError, match="timeout"):
        client.generate("x", timeout=0.001)
    with pytest.raises(NotFoundError):
        client.result(10**9)
    with pytest.raises(UnavailableError):
        Client(f"http://127.0.0.1:{free_port()}").submit("x")


def test_triton_client(triton: TritonServer) -> None:
    """The direct client gets the engine's answer, at once or step by step."""
    expected = generate(triton, text_input="hello", gen_length=12, seed=1)
    with TritonClient(triton.http_url, triton.grpc_url) as direct:
        assert direct.ready()
        assert direct.generate("hello", gen_length=12).token_ids.tolist() == expected.token_ids
        steps = list(direct.stream("hello", gen_length=12))
    assert [step.done for step in steps] == [False] * 11 + [True]
    assert steps[-1].token_ids.tolist() == expected.token_ids
    assert [len(step.token_texts or ()) for step in steps] == [12] * 12
    assert {step.block for step in steps} == {Block(0, 0, 12)}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def dllm(adapter: AdapterServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command `dllm`, which is installed beside this Python."""
    return run(str(Path(sys.executable).with_name("dllm")), *arguments, "--url", adapter.url)


def test_command_line(adapter: AdapterServer, client: Client, tmp_path: Path) -> None:
    """The command prints texts, ids and states; with --json, whole results."""
    text = client.generate("hello", gen_length=16)
    once = dllm(adapter, "generate", "hello", "--gen-length", "16")
    assert (once.returncode, once.stdout) == (0, f"{text}\n")

    job = dllm(adapter, "jobs", "submit", "hello", "--gen-length", "16").stdout.strip()
    eventually(lambda: adapter.result(int(job))["status"] == "finished", "the job is done")
    shown = json.loads(dllm(adapter, "jobs", "status", job, "--json").stdout)
    assert (shown["status"], shown["text"]) == ("finished", text)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n\nother\n")
    batch = dllm(adapter, "batch", str(prompts), "--gen-length", "16", "--json")
    assert [json.loads(line)["status"] for line in batch.stdout.splitlines()] == ["finished"] * 2
    assert dllm(adapter, "health").stdout == "ok\n"


def test_command_line_errors(adapter: AdapterServer) -> None:
    """A failure is one line on standard error and an exit code, not a traceback."""
    for arguments, word in (
        (["generate", "x", "--gen-length", "513"], "gen_length"),
        (["generate", "x", "--remasking", "best"], "remasking"),
        (["jobs", "status", "999999"], "999999"),
    ):
        failed = dllm(adapter, *arguments)
        assert failed.returncode != 0
        assert word in failed.stderr
        assert "Traceback" not in failed.stderr
