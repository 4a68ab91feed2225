"""A clock, a scripted engine, and the application around it."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from adapter.app import create_app
from adapter.engine.monitor import EngineMonitor
from adapter.errors import AdapterError, ConnectionLost, EngineDead, Unavailable
from adapter.settings import Settings
from adapter.types import (
    DEFAULT_PRIORITY,
    Canvas,
    CheckResult,
    Event,
    Inputs,
    ModelInfo,
    Repository,
    StreamDetail,
    Usage,
)

DONE = Event("an answer", "length", Usage(3, 32, 32, 32, 2), seed=7)
#: What is answered to decisions and scores.
READ = {
    "decide": replace(DONE, text='{"answers": [{"type": "predicate", "probability": 0.9}]}'),
    "score": replace(
        DONE, text='{"scores": [{"logprob": -0.1, "num_tokens": 1, "method": "monte_carlo"}]}'
    ),
}
SIGN_OF_LIFE = Event("an")
#: A sign of life of a request that has no place yet.
WAITING = Event("", usage=Usage(3, 0, 0, 0), seed=7, canvas=Canvas([0], [""], [-1.0], (0, 0, 1)))
MODEL = ModelInfo(
    checkpoint="demo_checkpoint",
    family="llada",
    architecture="LLaDAModelLM",
    num_parameters=1_066_112,
    max_model_len=512,
    mask_token_id=0,
)
HANG = "hang"

#: An `asyncio.Event` is waited for.
Script = list[Event | AdapterError | Exception | asyncio.Event | str]


def denoising(length: int, *, given: Mapping[int, int] | None = None) -> list[Event]:
    """The events of a canvas that is committed from left to right, one token a step.

    Position i gets token 100 + i, text `<i>`, confidence 1/2; `given` ones are there before.
    """
    given = given or {}
    events, shown = [], set(given)
    for position in (p for p in range(length) if p not in given):
        shown.add(position)
        ids = [given.get(i, 100 + i) if i in shown else 0 for i in range(length)]
        canvas = Canvas(
            token_ids=ids,
            token_texts=[f"<{i}>" if i in shown else "" for i in range(length)],
            confidence=[
                (1.0 if i in given else 0.5) if i in shown else -1.0 for i in range(length)
            ],
            block=(0, 0, length),
        )
        ready = next((i for i in range(length) if i not in shown), length)
        text = "".join(f"<{i}>" for i in range(ready))
        steps = len(shown) - len(given)
        reason = "length" if len(shown) == length else ""
        events.append(Event(text, reason, Usage(3, ready, steps, steps, 2), 7, canvas))
    return events


class HandClock:
    """A clock that stands still until somebody moves it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass
class ScriptedEngine:
    """Answers request after request with what the scripts say, the last one for ever."""

    scripts: list[Script] = field(default_factory=lambda: [[DONE]])
    alive: bool = True
    probe_error: AdapterError | None = None
    probe_hangs: bool = False
    #: What it says of prompts before they run; of the others, that there is this much headroom.
    check_results: dict[str, CheckResult] = field(default_factory=dict)
    headroom: int = 1000
    #: Tokens that its context has left behind any prompt; None for enough.
    longest: int | None = None
    check_hangs: bool = False
    checked: list[Inputs] = field(default_factory=list)
    #: What it says of its model; an error is raised instead.
    model: ModelInfo | AdapterError = field(default_factory=lambda: MODEL)
    described: int = 0
    #: What it says of its server's models.
    models: Repository = field(default_factory=lambda: Repository(("dllm",)))
    requests: list[Inputs] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    details: list[StreamDetail] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    closed: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(
        self,
        inputs: Inputs,
        *,
        request_id: str,
        detail: StreamDetail = StreamDetail.RESULT,
        priority: int = DEFAULT_PRIORITY,
    ) -> AsyncGenerator[Event, None]:
        """Play the next script; read what decisions and scores ask for at once."""
        self.request_ids.append(request_id)
        self.priorities.append(priority)
        self.check_connection()
        if not self.alive:
            raise EngineDead(f"Stub process 'dllm_0_0' is not healthy. {request_id}")
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        if readings := {"decide", "score"} & inputs.keys():
            script = [READ[readings.pop()]]
        self.requests.append(inputs)
        self.details.append(detail)
        try:
            for item in script:
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Event):
                    yield item
                elif isinstance(item, asyncio.Event):
                    await item.wait()
                else:
                    await self.ended.wait()
                    raise ConnectionLost("Socket closed")
        finally:
            self.closed += 1

    async def check(self, requests: Sequence[Inputs]) -> list[CheckResult]:
        """Refuse what it is told to, if it can be asked."""
        self.checked.extend(requests)
        self.check_connection()
        if not self.alive:
            raise EngineDead("Stub process 'dllm_0_0' is not healthy.")
        if self.check_hangs:
            await asyncio.Event().wait()
        return [self.check_results.get(_words(inputs)) or self._fits(inputs) for inputs in requests]

    def _fits(self, inputs: Inputs) -> CheckResult:
        if self.longest is None:
            return CheckResult(headroom=self.headroom)
        length = int(str(inputs["gen_length"]))
        if length > self.longest:
            reason = f"prompt ({512 - self.longest} tokens) plus gen_length ({length})"
            return CheckResult(refusal=f"gen_length: {reason} must be at most 512")
        return CheckResult(headroom=self.longest - length)

    async def describe(self) -> ModelInfo:
        """Say which model it is, if it can be asked."""
        self.described += 1
        self.check_connection()
        if isinstance(self.model, AdapterError):
            raise self.model
        return self.model

    async def repository(self, _known: Repository | None) -> Repository:
        """List the models, if it can be asked."""
        self.check_connection()
        return self.models

    def cancel(self, request_id: str) -> None:
        """Note it."""
        self.cancels.append(request_id)

    async def probe(self) -> None:
        """Answer as the engine is."""
        self.check_connection()
        if not self.alive:
            raise EngineDead("Stub process 'dllm_0_0' is not healthy.")
        if self.probe_hangs:
            await asyncio.Event().wait()
        if self.probe_error is not None:
            raise self.probe_error

    def end(self) -> None:
        """End as tritonserver does: every stream breaks, and it answers nothing any more."""
        self.ended.set()

    def start(self) -> None:
        """Start again, with no memory of earlier requests."""
        self.ended, self.alive, self.probe_hangs = asyncio.Event(), True, False

    async def close(self) -> None:
        """Nothing to let go of."""

    def check_connection(self) -> None:
        """Raise what a call to a tritonserver that has ended raises."""
        if self.ended.is_set():
            raise Unavailable("failed to connect")


def _words(inputs: Inputs) -> str:
    """The prompt of a request that was submitted with one."""
    return str(json.loads(str(inputs["messages"]))[0]["content"]) if "messages" in inputs else ""


def fast_settings(database_url: str, **changes: Any) -> Settings:
    """Settings under which everything that takes seconds takes some milliseconds."""
    values: dict[str, Any] = {
        "database_url": database_url,
        "lease_seconds": 0.6,
        "poll_interval": 0.02,
        "stream_interval": 0.05,
        "engine_idle_timeout": 0.3,
        "probe_interval": 0.05,
        "drain_seconds": 0.05,
    }
    return Settings(**(values | changes))


@dataclass
class RunningApp:
    """A worker that runs, and a client that talks to it."""

    app: FastAPI
    client: httpx.AsyncClient

    @property
    def monitor(self) -> EngineMonitor:
        """The monitor of the engine, or of the first one."""
        monitor: EngineMonitor = self.app.state.fleet.default.endpoints[0].monitor
        return monitor

    async def submit(self, prompt: str = "hello", **fields: Any) -> int:
        """Submit one prompt and return its id."""
        answer = await self.client.post("/v1/generate", json={"prompt": prompt, **fields})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["request_ids"][0])

    async def result(self, job_id: int, wait: float = 5) -> dict[str, Any]:
        """The result once the job is done."""
        answer = await self.client.get(f"/v1/result/{job_id}", params={"wait": wait})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def health(self) -> tuple[int, dict[str, Any]]:
        """Status code and body of the health call."""
        answer = await self.client.get("/v1/health")
        return answer.status_code, answer.json()


@asynccontextmanager
async def running_app(
    settings: Settings, engine: ScriptedEngine | Mapping[str, ScriptedEngine]
) -> AsyncIterator[RunningApp]:
    """Start a worker, wait for the monitor's first look, and stop the worker."""
    engines = {"engine:1": engine} if isinstance(engine, ScriptedEngine) else engine
    app = create_app(settings, engines=engines)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://adapter") as client,
    ):
        yield RunningApp(app, client)


@asynccontextmanager
async def served_app(
    settings: Settings, engine: ScriptedEngine, **options: Any
) -> AsyncIterator[str]:
    """The same worker behind a real socket; yields its URL. `options` are uvicorn's."""
    engines = {"engine:1": engine} if isinstance(engine, ScriptedEngine) else engine
    app = create_app(settings, engines=engines)
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, **options)
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve([listening]))
        try:
            await until(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for the condition; the test fails if it does not come true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
