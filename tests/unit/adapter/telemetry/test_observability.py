"""Watching the adapter: request ids, log, metrics, traces, dashboard."""

import asyncio
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from adapter_fakes import (
    DONE,
    HANG,
    SIGN_OF_LIFE,
    WAITING,
    RunningApp,
    ScriptedEngine,
    denoising,
    fast_settings,
    running_app,
    until,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from prometheus_client.parser import text_string_to_metric_families

from adapter.app import create_app
from adapter.auth.keys import entry_of
from adapter.errors import EngineFailure, InvalidRequest, StoreUnavailable, Unavailable
from adapter.jobs.service import JobService
from adapter.periodic import PeriodicTask
from adapter.telemetry import tracing
from launcher.ports import free_port

ROOT = Path(__file__).parents[4]
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def api(database_url: str, engine: ScriptedEngine) -> AsyncIterator[RunningApp]:
    """A worker that has patience with its engine."""
    async with running_app(fast_settings(database_url, engine_idle_timeout=30), engine) as running:
        await until(lambda: running.monitor.state.ok)
        yield running


async def test_request_id_of_the_caller_reaches_the_engine(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """A call's id comes back with the answer, and the engine's request carries it with the job."""
    headers = {"X-Request-ID": "order-7.b"}
    answer = await api.client.post("/v1/generate", json={"prompt": "a"}, headers=headers)
    await api.result(0)

    assert answer.headers["x-request-id"] == "order-7.b"
    (request_id,) = engine.request_ids
    assert re.fullmatch(r"0-order-7\.b-\S+-0-0", request_id)


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, 'a"b', "ü"])
async def test_calls_without_a_usable_id_get_one(api: RunningApp, given: str | None) -> None:
    """An id that could disturb a log is not taken over, and every answer has one of its own."""
    headers = {} if given is None else {"X-Request-ID": given.encode()}
    answers = [await api.client.get("/v1/result/9", headers=headers) for _ in range(2)]

    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


async def samples(api: RunningApp) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = await api.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name.removeprefix("dllm_adapter_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


class Growth:
    """How much each sample has grown since this was made."""

    def __init__(self, before: dict[Any, float]) -> None:
        self.before = before

    async def now(self, api: RunningApp, name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return (await samples(api)).get(key, 0.0) - self.before.get(key, 0.0)


async def test_metrics_tell_what_happened(api: RunningApp, engine: ScriptedEngine) -> None:
    """Jobs, tokens, passes and calls are counted, and their times are taken."""
    engine.scripts = [[DONE], [InvalidRequest("steps: no")], [EngineFailure("x")], [DONE], [HANG]]
    growth = Growth(await samples(api))
    for number in range(3):
        await api.submit()
        await api.result(number)
    await api.submit()
    await until(lambda: len(engine.requests) == 5)

    async def grown(name: str, **labels: str) -> float:
        return await growth.now(api, name, **labels)

    of = {"model": "dllm"}
    assert await grown("jobs_submitted_total", **of) == 4
    settled = [
        await grown("jobs_settled_total", outcome=o) for o in ("finished", "failed", "interrupted")
    ]
    assert settled == [2, 1, 1]
    done = [await grown("jobs_done_total", state=s) for s in ("finished", "failed", "cancelled")]
    assert done == [2, 1, 0]
    assert await grown("tokens_total", kind="prompt", **of) == 6
    assert await grown("tokens_total", kind="completion", **of) == 64
    assert await grown("forward_passes_total", **of) == 64
    assert await grown("denoising_steps_total", **of) == 64
    assert await grown("job_queue_seconds_count", **of) == 5
    assert await grown("job_run_seconds_count", **of) == 2
    assert await grown("inflight_requests", **of) == 1
    posts = {"method": "POST", "route": "/v1/generate"}
    assert await grown("http_requests_total", status="200", **posts) == 4
    assert await grown("http_request_seconds_count", **posts) == 4
    assert await grown("store_seconds_count", kind="write") > 4
    now = await samples(api)
    assert now[("jobs", frozenset({("state", "running"), ("model", "dllm")}))] == 1
    assert now[("jobs", frozenset({("state", "queued"), ("model", "dllm")}))] == 0
    assert any(name == "engine_ready" and value == 1 for (name, _), value in now.items())


async def test_unknown_paths_make_one_series(api: RunningApp) -> None:
    """Unknown paths and job ids add no series to the metrics."""
    growth = Growth(await samples(api))
    for path in ("/a", "/b", "/v1/result/1", "/v1/result/2"):
        await api.client.get(path)

    get = {"method": "GET", "status": "404"}
    assert await growth.now(api, "http_requests_total", route="none", **get) == 2
    route = "/v1/result/{request_id}"
    assert await growth.now(api, "http_requests_total", route=route, **get) == 2


async def test_a_bug_is_counted_as_500(api: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that meets a bug is a 500 of its route, and its response has the request id."""

    async def broken(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(JobService, "cancel", broken)
    growth = Growth(await samples(api))
    answer = await api.client.delete("/v1/result/0", headers={"X-Request-ID": "order-8"})

    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "order-8")
    labels = {"method": "DELETE", "route": "/v1/result/{request_id}", "status": "500"}
    assert await growth.now(api, "http_requests_total", **labels) == 1


async def test_refusals_have_their_route(database_url: str, engine: ScriptedEngine) -> None:
    """A call that is refused before it is routed counts for the route that it wanted."""
    settings = fast_settings(database_url, api_keys=entry_of("me", "key"))
    async with running_app(settings, engine) as api:
        growth = Growth(await samples(api))
        await api.client.post("/v1/generate", json={"prompt": "a"})
        await api.client.get("/v1/result/7")
        await api.client.get("/v1/nothing")
        for method, route in [
            ("POST", "/v1/generate"),
            ("GET", "/v1/result/{request_id}"),
            ("GET", "none"),
        ]:
            labels = {"method": method, "route": route, "status": "401"}
            assert await growth.now(api, "http_requests_total", **labels) == 1


async def test_streams_and_held_polls_have_histograms_of_their_own(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """A stream or a held poll lasts as long as the engine needs: they do not blur the latency."""
    engine.scripts = [[DONE], [SIGN_OF_LIFE, DONE]]
    growth = Growth(await samples(api))
    await api.result(await api.submit())
    await api.client.get("/v1/result/0")
    await api.client.post("/v1/generate/stream", json={"prompt": "a"})

    result = {"route": "/v1/result/{request_id}"}
    assert await growth.now(api, "http_poll_seconds_count", **result) == 1
    assert await growth.now(api, "http_request_seconds_count", method="GET", **result) == 1
    stream = {"route": "/v1/generate/stream"}
    assert await growth.now(api, "http_stream_seconds_count", **stream) == 1
    assert await growth.now(api, "http_request_seconds_count", method="POST", **stream) == 0


async def test_streams_time_their_first_text_and_their_tokens(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """A stream counts once for the time to its first text and once for its pace; jobs do not."""
    first = asyncio.Event()
    engine.scripts = [[DONE], [WAITING, first, *denoising(4)]]
    growth = Growth(await samples(api))
    await api.result(await api.submit())
    asyncio.get_running_loop().call_later(0.2, first.set)
    await api.client.post("/v1/generate/stream", json={"prompt": "a", "gen_length": 4})

    assert await growth.now(api, "gen_ai_server_time_to_first_token_seconds_count") == 1
    waited = await growth.now(api, "gen_ai_server_time_to_first_token_seconds_sum")
    assert 0.1 < waited < 5
    assert await growth.now(api, "gen_ai_server_time_per_output_token_seconds_count") == 1


async def test_version_and_process_are_shown(api: RunningApp) -> None:
    """The page has the version and the conventional process metrics, and no `_created` series."""
    page = (await api.client.get("/metrics")).text
    now = await samples(api)
    assert now[("build_info", frozenset({("version", version("dllm-serve"))}))] == 1
    assert now[("process_resident_memory_bytes", frozenset())] > 1e7
    assert now[("process_cpu_seconds_total", frozenset())] > 0
    assert (
        abs(now[("process_start_time_seconds", frozenset())] - psutil.Process().create_time()) < 2
    )
    assert "_created" not in page


async def test_recovery_is_no_warning(
    database_url: str, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """That an engine answers again is logged at info, that it does not as a warning."""
    caplog.set_level("INFO", "adapter")
    async with running_app(fast_settings(database_url), engine) as api:
        await until(lambda: api.monitor.state.ok)
        engine.probe_error = Unavailable("away")
        await until(lambda: not api.monitor.state.ok)
    levels = [r.levelname for r in caplog.records if "engine_state" in r.getMessage()]
    assert levels == ["INFO", "WARNING"]


async def test_dashboard_and_alerts_use_metrics_that_exist(api: RunningApp) -> None:
    """Each metric that the Grafana dashboard or an alert names is exported, by us or the engine."""
    await api.result(await api.submit())
    page = (await api.client.get("/metrics")).text
    engine_side = (ROOT / "model_repository/dllm/1/dllm_metrics.py").read_text()
    dashboard = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    alerts = yaml.safe_load((ROOT / "deploy/prometheus-alerts.yaml").read_text())
    queries += [rule["expr"] for rule in alerts["groups"][0]["rules"]]
    named = set(re.findall(r"\b(?:dllm|nv|gen_ai)_\w+", " ".join(queries)))
    assert len(named) > 15
    shown = {name.removesuffix("_bucket") for name in named}
    for name in shown:
        if name.startswith(("dllm_adapter_", "gen_ai_")):
            assert f"# TYPE {name} " in page, name
        else:
            assert f'"{name}"' in engine_side, name
    histograms = engine_side.partition("_HISTOGRAMS = (")[2].partition("\n    )")[0]
    assert set(re.findall(r'"(dllm_\w+)"', histograms)) <= shown
    assert {"gen_ai_server_time_to_first_token_seconds"} <= shown


class Spans:
    """Keeps the spans that are recorded while a test runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        monkeypatch.setattr(tracing, "tracer", provider.get_tracer("test"))

    def of(self, kind: SpanKind) -> list[Any]:
        return [span for span in self.exporter.get_finished_spans() if span.kind == kind]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    return Spans(monkeypatch)


async def test_trace_leads_from_the_call_to_the_denoising_steps(
    database_url: str, spans: Spans
) -> None:
    """A job's span is a child of the call that submitted it, in its caller's trace."""
    engine = ScriptedEngine([[SIGN_OF_LIFE, SIGN_OF_LIFE, DONE]])
    app = create_app(fast_settings(database_url), engines={"engine:1": engine})
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client,
    ):
        await client.post(
            "/v1/generate", json={"prompt": "a"}, headers={"traceparent": TRACEPARENT}
        )
        await client.get("/v1/result/0", params={"wait": 5})
        await until(lambda: bool(spans.of(SpanKind.CLIENT)))
        submit = next(s for s in spans.of(SpanKind.SERVER) if "generate" in s.name)
        (denoise,) = spans.of(SpanKind.CLIENT)

    assert submit.context.trace_id == denoise.context.trace_id == int(TRACEPARENT[3:35], 16)
    assert submit.parent.span_id == int(TRACEPARENT[36:52], 16)
    assert denoise.parent.span_id == submit.context.span_id
    assert submit.attributes["http.route"] == "/v1/generate"
    assert submit.attributes["http.response.status_code"] == 200
    assert [event.name for event in denoise.events] == ["denoising"] * 3
    assert denoise.events[-1].attributes["finish_reason"] == "length"
    assert denoise.events[-1].attributes["forward_passes"] == 32
    assert denoise.attributes["triton.request_id"].startswith("0-")


async def test_failed_request_fails_its_span(database_url: str, spans: Spans) -> None:
    """What the engine says against a request is the status of its span."""
    engine = ScriptedEngine([[InvalidRequest("steps: no")]])
    app = create_app(fast_settings(database_url), engines={"engine:1": engine})
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client,
    ):
        await client.post("/v1/generate", json={"prompt": "a"})
        await until(lambda: bool(spans.of(SpanKind.CLIENT)))
    (denoise,) = spans.of(SpanKind.CLIENT)
    assert denoise.status.description == "InvalidRequest: steps: no"


EXPORT = """
from adapter.telemetry.tracing import TRACEPARENT, call_span, configure_tracing
flush = configure_tracing()
call_span("GET /v1/health", {}).end()
print(TRACEPARENT.get())
flush()
"""


def test_silent_collector_does_not_hold_a_stop_up() -> None:
    """Sending the last spans ends in some seconds if the collector never answers."""
    timed = EXPORT.replace("flush()", "began = time.monotonic(); flush()")
    timed = f"import time{timed}print(time.monotonic() - began)"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": address}
        command = [sys.executable, "-c", timed]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
    assert 1 < float(done.stdout.splitlines()[-1]) < 5


def test_spans_go_to_the_collector_of_the_environment() -> None:
    """With tracing on, spans are sent over OTLP to where OpenTelemetry's own variable says."""
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            received.append((self.path, self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not on stderr."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": address}
        command = [sys.executable, "-c", EXPORT]
        out = subprocess.check_output(command, env=environment, timeout=60, text=True)
        server.shutdown()
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", out.strip())
    ((path, body),) = received
    assert path == "/v1/traces"
    assert b"dllm-adapter" in (gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)


async def test_trace_context_passes_through_untraced(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without tracing a caller's trace context reaches the engine as it is, if it is one."""
    seen: list[str | None] = []
    monkeypatch.setattr(ScriptedEngine, "generate", _noting(seen, ScriptedEngine.generate))
    async with running_app(fast_settings(database_url), ScriptedEngine()) as api:
        for number, given in enumerate((TRACEPARENT, "nonsense")):
            await api.client.post(
                "/v1/generate", json={"prompt": "a"}, headers={"traceparent": given}
            )
            await api.result(number)
    assert seen == [TRACEPARENT, None]


def _noting(seen: list[str | None], generate: Any) -> Any:
    async def noting(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        seen.append(tracing.TRACEPARENT.get())
        async for event in generate(*arguments, **options):
            yield event

    return noting


def test_opentelemetry_is_loaded_only_when_asked_for() -> None:
    """Without tracing the extra may be missing."""
    code = "import sys, adapter.app; assert 'opentelemetry.sdk' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def log_of(tmp_path: Path, database_url: str):  # type: ignore[no-untyped-def]
    """Run a real worker with these settings, make some calls, and return what it has written."""

    def run(*options: str, **settings: str) -> list[str]:
        port = free_port()
        environment = {
            "DLLM_DATABASE_URL": database_url,
            "DLLM_TRITON_URL": f"127.0.0.1:{free_port()}",
            **settings,
        }
        command = [sys.executable, "-m", "adapter", "--port", str(port), *options]
        log = tmp_path / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stderr=file, stdout=file)
        try:
            transport = httpx.HTTPTransport(retries=20)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport) as client:
                headers = {"X-Request-ID": "call-1", "X-API-Key": "sesame"}
                body = {"prompt": "a secret"}
                client.post("/v1/generate", json=body, headers=headers)
        finally:
            process.terminate()
            process.wait(30)
        return log.read_text().splitlines()

    return run


@pytest.mark.parametrize("workers", ["1", "2"])
def test_json_log_has_one_object_a_line(log_of: Any, workers: str) -> None:
    """Every line, uvicorn's too, is JSON with time, level and event; calls have their ids."""
    written = log_of("--workers", workers, DLLM_LOG_FORMAT="json")
    lines = [json.loads(line) for line in written]
    assert all({"timestamp", "level", "event"} <= line.keys() for line in lines)
    (call,) = [line for line in lines if line["event"] == "call"]
    assert (call["request_id"], call["path"], call["status"]) == ("call-1", "/v1/generate", 200)
    assert any("Uvicorn running" in line["event"] for line in lines)


def test_long_lines_of_the_json_log_stay_whole(capfd: pytest.CaptureFixture[str]) -> None:
    """A line is no longer than a pipe keeps whole, even with a long traceback or many fields."""
    code = """
from adapter.telemetry.logs import configure_logging, get_logger
configure_logging("INFO", "json")
def deep(n):
    if n: deep(n - 1)
    raise ValueError("ä" * 9000)
try:
    deep(200)
except ValueError:
    get_logger().exception("long")
get_logger().info("wide", **{f"field{n}": n for n in range(2000)})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    lines = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["long", "wide"]
    assert all(len(line.encode()) < 4096 for line in lines)


@pytest.mark.parametrize("kind", ["json", "text"])
def test_log_keeps_secrets(log_of: Any, kind: str) -> None:
    """Neither what users write nor what admits them is in the log, at any level."""
    text = "\n".join(log_of(DLLM_LOG_FORMAT=kind, DLLM_LOG_LEVEL="DEBUG"))
    assert "call-1" in text
    assert "secret" not in text
    assert "sesame" not in text


@pytest.mark.parametrize("kind", ["json", "text"])
def test_log_of_an_exception_keeps_secrets(kind: str) -> None:
    """An exception is logged with where it was raised, and without what variables held there."""
    code = f"""
from adapter.telemetry.logs import configure_logging, get_logger
configure_logging("INFO", {kind!r})
def answer(prompt):
    raise KeyError("surprise")
try:
    answer("sec" + "ret")
except KeyError as error:
    get_logger().error("answer_failed", exc_info=error)
"""
    command = [sys.executable, "-c", code]
    log = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stderr
    assert "in answer" in log
    assert "surprise" in log
    assert "secret" not in log


@pytest.mark.parametrize(
    ("error", "traced"), [(StoreUnavailable("away"), False), (KeyError("away"), True)]
)
async def test_loop_outlives_its_errors(
    error: Exception, traced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """That the database is away is foreseen and takes one line; the rest tells where it was."""
    steps = [error]

    async def step() -> None:
        if steps:
            raise steps.pop()
        done.set()

    done = asyncio.Event()
    async with PeriodicTask("looking", step, error_pause=0.01), asyncio.timeout(5):
        await done.wait()

    (record,) = caplog.records
    assert "'task': 'looking'" in record.getMessage()
    assert "away" in caplog.text
    assert ("Traceback" in caplog.text) == traced


WORKER = """
import asyncio, sys
from adapter.telemetry.metrics import INFLIGHT, JOBS_SUBMITTED, exposition
INFLIGHT.labels("dllm").inc()
JOBS_SUBMITTED.labels("dllm").inc()
print(asyncio.run(exposition(None)).decode(), flush=True)
sys.stdin.read()
"""


def test_a_dead_worker_leaves_its_counts_and_not_its_gauges(tmp_path: Path) -> None:
    """Workers count together; of one that has died counters stay, and gauges go."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def counts() -> tuple[float, float]:
        """What a new worker shows; it ends then."""
        command = [sys.executable, "-c", WORKER]
        page = subprocess.run(
            command, env=environment, input="", capture_output=True, text=True, timeout=60
        ).stdout
        shown = {s.name: s.value for f in text_string_to_metric_families(page) for s in f.samples}
        return (
            shown["dllm_adapter_jobs_submitted_total"],
            shown["dllm_adapter_inflight_requests"],
        )

    with subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as living:
        assert living.stdout is not None
        living.stdout.readline()
        assert counts() == (2, 2)
        assert counts() == (3, 2)
        living.kill()
        living.wait()
        assert counts() == (4, 1)
