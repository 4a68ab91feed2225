"""`dllm bench`: arrivals, measures, and the report."""

import itertools
import json
import math
import statistics
from pathlib import Path

import httpx
import pytest
from client_fakes import Script
from dllm_client import AsyncClient
from dllm_client._load import Load, Sample, random_requests, report
from dllm_client.cli import options
from typer.testing import CliRunner, Result

from launcher.program import app

BLOCK = {"index": 0, "start": 0, "end": 2}


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_spread(burstiness: float) -> None:
    """Gaps have the mean 1 / rate and the deviation of a gamma distribution of that shape."""
    gaps = list(itertools.islice(Load(20.0, burstiness, seed=1).gaps(), 20_000))
    assert statistics.mean(gaps) == pytest.approx(0.05, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.05 / burstiness**0.5, rel=0.05)
    again = Load(20.0, burstiness, seed=1).gaps()
    assert list(itertools.islice(again, 100)) == gaps[:100]
    assert list(itertools.islice(Load(math.inf).gaps(), 3)) == [0.0, 0.0, 0.0]


def test_random_prompts_keep_their_lengths() -> None:
    """Words and canvases lie between their bounds, and a seed repeats them."""
    requests = random_requests(200, words=(3, 5), gen_lengths=(8, 9), seed=2)
    assert {len(str(one.prompt).split()) for one in requests} == {3, 4, 5}
    assert {one.params.get("gen_length") for one in requests} == {8, 9}
    assert requests == random_requests(200, words=(3, 5), gen_lengths=(8, 9), seed=2)


def test_the_report_is_computed_from_the_samples() -> None:
    """Throughput counts answered requests; goodput those that keep all limits."""
    samples = [
        Sample(0.0, ttft=0.1, e2el=0.5, itl=[0.2, 0.2], prompt_tokens=3, output_tokens=5, steps=2),
        Sample(0.5, ttft=0.3, e2el=0.3, prompt_tokens=3, output_tokens=1, steps=1),
        Sample(0.6, error="refused"),
    ]
    limits = {"ttft": 200.0, "e2el": 600.0}
    found = report(samples, 2.0, load=Load(math.inf), model="m", goodput=limits)
    expected = {
        "completed": 2,
        "failed": 1,
        "request_rate": "inf",
        "request_throughput": 1.0,
        "output_throughput": 3.0,
        "total_token_throughput": 6.0,
        "request_goodput": 0.5,
        "tokens_per_step": 2.0,
        "mean_ttft_ms": 200.0,
        "median_tpot_ms": 100.0,
        "mean_itl_ms": 200.0,
        "p50_e2el_ms": 400.0,
        "p99_e2el_ms": 498.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["errors"] == ["", "", "refused"]


def denoising(request: httpx.Request) -> httpx.Response:
    """The models, or a stream with two events that bring text."""
    if request.url.path == "/v1/models":
        return httpx.Response(200, json={"data": [{"id": "dllm"}]})
    if b"refuse" in request.content:
        return httpx.Response(422, json={"detail": "refused"})
    step = {"block": BLOCK, "canvas": [None, None], "committed": [], "seed": 7}
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "steps": 2, "forward_passes": 2}
    done = {"text": "ab", "finish_reason": "length", "usage": usage, "seed": 7}
    events = [
        ("step", {**step, "step": 1, "final_text": ""}),
        ("step", {**step, "step": 2, "final_text": "a"}),
        ("done", done),
    ]
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    return httpx.Response(200, content=body.encode())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A scripted service behind the command."""
    script = Script([denoising])

    def scripted(url: str, *, api_key: str | None, timeout: float) -> AsyncClient:
        transport = httpx.MockTransport(script)
        return AsyncClient(url, api_key=api_key, timeout=timeout, transport=transport)

    monkeypatch.setattr(options, "AsyncClient", scripted)
    return script


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_a_load_is_sent_and_reported(script: Script, tmp_path: Path) -> None:
    """Every request is sent with the fields that were asked for; report and plot are written."""
    saved, plot = tmp_path / "r.json", tmp_path / "r.svg"
    outcome = bench(
        *("--num-prompts", "5", "--warmups", "2", "--output-len", "8:9", "--steps", "4"),
        *("--max-concurrency", "2", "--save", str(saved), "--plot", str(plot), "--json"),
        *("--goodput", "e2el:60000"),
    )
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    streams = [json.loads(r.content) for r in script.requests if r.method == "POST"]
    assert len(streams) == 7
    assert {one["gen_length"] for one in streams} <= {8, 9}
    assert all((one["steps"], one["ignore_eos"]) == (4, True) for one in streams)
    found = json.loads(saved.read_text())
    assert (found["completed"], found["model_id"], found["total_output_tokens"]) == (5, "dllm", 10)
    assert [len(gaps) for gaps in found["itls"]] == [1] * 5
    assert all(0 < a <= b for a, b in zip(found["ttfts"], found["e2els"], strict=True))
    assert found["request_goodput"] == found["request_throughput"]
    printed = json.loads(outcome.stdout)
    assert printed.items() <= found.items()
    assert "ttfts" not in printed
    assert plot.read_text().startswith("<?xml")


def test_failed_requests_are_counted_and_told(script: Script, tmp_path: Path) -> None:
    """Lines of a file are sent in turn; the exit code is 1 if one is refused."""
    del script
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\nrefuse\n")
    outcome = bench("--prompts", str(prompts), "--num-prompts", "4", "--warmups", "0")
    assert outcome.exit_code == 1
    assert "2 of 4" in outcome.stdout
    assert "end-to-end latency" in outcome.stdout
    assert outcome.stderr == "dllm: 2 requests failed: refused\n"


def test_a_file_of_prompts_that_is_no_text_is_named(script: Script, tmp_path: Path) -> None:
    """The message names the file and the option, and nothing is sent."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xff\xfe")
    outcome = bench("--prompts", str(prompts))
    assert outcome.exit_code == 2
    assert "--prompts" in outcome.stderr
    assert "prompts.txt" in outcome.stderr.replace("\n", "").replace("│", "").replace(" ", "")
    assert script.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--input-len", "9:3"),
        ("--output-len", "x"),
        ("--goodput", "ttft"),
        ("--goodput", "a:5"),
        ("--plot", "latencies.txt"),
        ("--plot", "absent/latencies.png"),
        ("--save", "absent/report.json"),
    ],
)
def test_bad_options_are_named(script: Script, arguments: tuple[str, str]) -> None:
    """The exit code is 2, and nothing is sent."""
    outcome = bench(*arguments)
    assert outcome.exit_code == 2
    assert "must" in outcome.stderr
    assert script.requests == []
