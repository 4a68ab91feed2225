"""Real tritonservers: two models in one, and servers that come and go under load."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from dllm_client import Client
from dllm_client.triton import TritonClient

from adapter.app import create_app
from adapter.settings import Settings
from launcher.repository import add_model
from launcher.tritonserver import TritonServer
from tests.support.servers import REPOSITORY, AdapterServer, eventually, metric, triton_server

pytestmark = pytest.mark.slow

DREAM = REPOSITORY / "dllm/1/demo_checkpoint_dream"
FINISHED = "dllm_requests_finished_total"
CAPITAL = "What is the capital of France?"


@pytest.fixture(scope="module")
def both(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A tritonserver with `dllm` and `dream`."""
    repository = tmp_path_factory.mktemp("models")
    for name in ("dllm", "dllm_unary"):
        (repository / name).symlink_to(REPOSITORY / name)
    add_model(repository, "dream", str(DREAM), {"DLLM_MAX_NUM_SEQS": "2"})
    with triton_server(checkpoint, repository=repository) as server:
        yield server


def test_model_chooses_everywhere(both: TritonServer, tmp_path: Path) -> None:
    """Jobs, OpenAI's calls and Triton's own: each model answers as itself, alone or in both."""
    with AdapterServer(both, tmp_path / "jobs.db") as adapter, Client(adapter.url) as client:
        listed = requests.get(f"{adapter.url}/v1/models", timeout=30).json()["data"]
        assert [(m["id"], m["family"]) for m in listed] == [("dllm", "llada"), ("dream", "dream")]
        assert listed[1]["checkpoint"] == DREAM.name

        unnamed = client.generate(CAPITAL, gen_length=32)
        assert client.generate(CAPITAL, gen_length=32, model="dllm") == unnamed
        by_dream = client.generate(CAPITAL, gen_length=32, model="dream")
        assert "Paris" in by_dream
        messages = [{"role": "user", "content": CAPITAL}]
        body = {"model": "dream", "messages": messages}
        chat = requests.post(f"{adapter.url}/v1/chat/completions", json=body, timeout=60).json()
        assert "Paris" in chat["choices"][0]["message"]["content"]
        eventually(lambda: metric(both, FINISHED, "dream") >= 2, "Dream counts its answers", 10)

    with TritonClient(both.http_url, both.grpc_url, model="dream") as direct:
        assert direct.generate(messages, gen_length=32).text == by_dream
        assert [*direct.stream(messages, gen_length=32)][-1].text == by_dream


def test_servers_come_and_go_under_load(
    both: TritonServer,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name gains a server and loses one while jobs come in: each job runs once and finishes."""
    hosts = ["127.0.0.1"]
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if host != "triton.test":
            return real(host, port, *rest, **named)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    other = TritonServer(
        REPOSITORY,
        address="127.0.0.2",
        http_port=0,
        grpc_port=both.grpc_port,
        metrics_port=0,
        env={"MODEL_PATH": str(checkpoint), "DLLM_DEVICE": "cpu"},
    )
    settings = Settings(
        triton_url=f"triton.test:{both.grpc_port}",
        database_url=f"sqlite:///{tmp_path}/jobs.db",
        discovery_interval=0.2,
    )

    async def scenario() -> list[dict[str, Any]]:
        app = create_app(settings)
        transport = httpx.ASGITransport(app)
        ids: list[int] = []
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://adapter") as client,
        ):
            fleet = app.state.fleet

            async def submit(condition: Callable[[], bool]) -> None:
                """Submit jobs, a few at once, until the condition holds."""
                while not condition():
                    body = {"prompts": ["What is AI?"] * 4, "gen_length": 32}
                    answer = await client.post("/v1/generate_batch", json=body)
                    ids.extend(answer.json()["request_ids"])
                    await client.get(f"/v1/result/{ids[-1]}?wait=60")

            def known(*expected: str) -> Callable[[], bool]:
                wanted = {f"{host}:{both.grpc_port}" for host in expected}
                return lambda: (
                    {e.name for e in fleet.default.endpoints} == wanted
                    and all(e.monitor.state.ok for e in fleet.default.endpoints)
                )

            starting = asyncio.create_task(asyncio.to_thread(other.start))
            await submit(starting.done)
            hosts[:] = ["127.0.0.1", "127.0.0.2"]
            await submit(known("127.0.0.1", "127.0.0.2"))
            at_other = next(e for e in fleet.default.endpoints if "127.0.0.2" in e.name)
            await submit(lambda: at_other.inflight > 0 or metric(other, FINISHED) > 0)
            hosts[:] = ["127.0.0.1"]
            await submit(known("127.0.0.1"))
            await submit(lambda: at_other.inflight == 0)
            await asyncio.to_thread(other.stop)
            await submit(known("127.0.0.1"))
            page = (await client.get("/metrics")).text
            assert 'settled_total{outcome="interrupted"} ' not in page
            return [(await client.get(f"/v1/result/{i}?wait=60")).json() for i in ids]

    try:
        results = asyncio.run(scenario())
    finally:
        other.stop()
    assert {result["status"] for result in results} == {"finished"}
    assert len({result["text"] for result in results}) == 1
