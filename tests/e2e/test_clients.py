"""Well-known OpenAI clients, from their registries, against the whole service.

What runs is the code on docs/clients.md, with this service's address.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.support.registries import install, node_packages, scratch
from tests.support.servers import CHECKOUT, REPOSITORY, AdapterServer, triton_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS = CHECKOUT / "tests/clients"
PAGE = (CHECKOUT / "docs/clients.md").read_text()
ADDRESS = "http://localhost:8000"
QUESTION = "What is 17 + 25?"
RUN_SECONDS = 120


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterServer]:
    """The service with the demo checkpoint, which can add."""
    folder = tmp_path_factory.mktemp("clients")
    checkpoint = REPOSITORY / "dllm/1/demo_checkpoint"
    with (
        triton_server(checkpoint, log_file=folder / "triton.log") as triton,
        AdapterServer(triton, folder / "jobs.db") as adapter,
    ):
        yield adapter


@pytest.fixture(scope="module")
def answer(service: AdapterServer) -> str:
    """The answer to the question, from a plain call."""
    messages = [{"role": "user", "content": QUESTION}]
    choice = plain_call(service, "chat/completions", messages=messages, max_tokens=32)
    text: str = choice["message"]["content"]
    assert "42" in text
    return text


def plain_call(service: AdapterServer, path: str, **body: Any) -> Any:
    """The choice in the answer to a call without a client."""
    reply = requests.post(f"{service.url}/v1/{path}", json={"model": "dllm", **body}, timeout=60)
    return reply.json()["choices"][0]


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> Path:
    """An interpreter with the clients that pip installs."""
    wanted = CLIENTS / "requirements.txt"
    folder = scratch(pytestconfig, wanted)
    interpreter = folder / "bin/python"
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--no-compile", "--retries=1"]
    install(folder, [[sys.executable, "-m", "venv", folder], [*pip, "-r", wanted]])
    return interpreter


@pytest.fixture(scope="module")
def node(pytestconfig: pytest.Config) -> Path:
    """A folder with the clients that npm installs."""
    return node_packages(pytestconfig, CLIENTS / "package.json")


def blocks(client: str, language: str) -> list[str]:
    """All code in this language on the page below the client's heading."""
    section = PAGE.split(f"\n## {client}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def run(command: Sequence[str | Path], folder: Path | None = None) -> str:
    """Run a client, and return what it prints."""
    local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **local},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("client", ["LangChain", "LiteLLM", "AutoGen"])
def test_python_client(client: str, python: Path, service: AdapterServer, answer: str) -> None:
    """The code on the page prints the answer twice: whole, and joined from a stream."""
    (code,) = blocks(client, "python")
    assert ADDRESS in code
    printed = run([python, "-c", code.replace(ADDRESS, service.url)])
    assert printed == f"{answer}\n{answer}"


@pytest.mark.parametrize("provider", ["@ai-sdk/openai-compatible", "@ai-sdk/openai"])
def test_vercel_ai_sdk(provider: str, node: Path, service: AdapterServer, answer: str) -> None:
    """With each provider the page's code prints the answer twice: whole, and from a stream."""
    (code,) = (code for code in blocks("Vercel AI SDK", "js") if f'"{provider}"' in code)
    assert ADDRESS in code
    (node / "ai_sdk.mjs").write_text(code.replace(ADDRESS, service.url))
    assert run(["node", "ai_sdk.mjs"], node) == f"{answer}\n{answer}"


def check_tools(found: Any) -> None:
    """One valid call, the same whole and streamed, and valid objects."""
    ((name, arguments),) = found["whole"]
    assert name == "Add"
    assert found["streamed"] == found["whole"]
    for values in (arguments, *found["structured"]):
        assert set(values) == {"exact", "unit"}
        assert all(isinstance(value, bool) for value in values.values())


def test_langchain_calls_tools(python: Path, service: AdapterServer) -> None:
    """`bind_tools` and `with_structured_output` give valid calls of a checkpoint that knows no
    tools, and the next turn takes the call and its result."""
    found = json.loads(run([python, CLIENTS / "langchain_tools.py", service.url]))
    check_tools(found)
    assert found["reason"] == "tool_calls"
    assert found["after"] in ("stop", "length")


def test_vercel_ai_sdk_calls_tools(node: Path, service: AdapterServer) -> None:
    """`generateText` and `streamText` with `toolChoice`, and `generateObject`, give the same."""
    shutil.copy(CLIENTS / "ai_sdk_tools.mjs", node)
    found = json.loads(run(["node", "ai_sdk_tools.mjs", service.url], node))
    check_tools(found)
    assert found["reason"] == "tool-calls"


def test_continue(node: Path, service: AdapterServer, answer: str) -> None:
    """The page's configuration gives a chat with Continue's default length, and completions."""
    (code,) = blocks("Continue", "yaml")
    (model,) = yaml.safe_load(code)["models"]
    model["apiBase"] = model["apiBase"].replace(ADDRESS, service.url)
    shutil.copy(CLIENTS / "continue.mjs", node)
    prompt = "hello"
    printed = json.loads(run(["node", "continue.mjs", json.dumps(model), QUESTION, prompt], node))
    here = plain_call(service, "completions", prompt=prompt, max_tokens=16)
    assert printed["chat"] == answer
    assert printed["completion"] == here["text"] != ""


def test_lm_evaluation_harness(python: Path, service: AdapterServer, tmp_path: Path) -> None:
    """With the page's arguments it evaluates the chat model, which gets both sums right."""
    (code,) = blocks("lm-evaluation-harness", "bash")
    options = dict(re.findall(r"--(\w+) ([^-\s]\S*)", code))
    assert ADDRESS in options["model_args"]
    arguments = options["model_args"].replace(ADDRESS, service.url)
    printed = run([python, CLIENTS / "evaluate.py", options["model"], arguments, tmp_path])
    assert json.loads(printed.splitlines()[-1]) == 1.0
