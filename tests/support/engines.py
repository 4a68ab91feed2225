"""Makes engines for a test and drives them step by step."""

from __future__ import annotations

from pathlib import Path

from dllm_engine import CanvasUpdate, Engine, EngineConfig, Prompt, SamplingParams

PROMPT = [1, 2, 3]


def make_engine(directory: Path, **settings: object) -> Engine:
    """Make an engine on this checkpoint."""
    return Engine(EngineConfig(model_path=directory, **settings))  # type: ignore[arg-type]


def run(engine: Engine) -> dict[int, CanvasUpdate]:
    """Step until all requests are finished; returns final updates by request id."""
    finished = {}
    while engine.has_work:
        finished |= {u.request_id: u for u in engine.step() if u.finished}
    return finished


def submit(engine: Engine, **params: object) -> int:
    """Queue a request with these parameters; returns its id."""
    request = engine.make_request(Prompt(PROMPT), SamplingParams(**params))  # type: ignore[arg-type]
    engine.add(request)
    return request.request_id
