"""The engine's distributions of times and sizes."""

from pathlib import Path

from dllm_engine.loop.histograms import Histogram

from tests.support.engines import FakeRunner, make_engine, run, submit


def test_a_value_is_counted_in_its_bucket_and_all_above() -> None:
    """A bucket holds the values up to its end, the end itself included."""
    histogram = Histogram((1, 2, 4))
    for value in (0.5, 1, 3, 9):
        histogram.observe(value)
    assert histogram.cumulative == [2, 2, 3, 4]
    assert histogram.sum == 13.5


def test_every_answer_and_step_is_observed_once(checkpoint: Path) -> None:
    """Requests count where they are admitted, show a first token and end; steps with their size."""
    engine = make_engine(checkpoint, FakeRunner())
    for length in (2, 5, 5):
        submit(engine, gen_length=length, ignore_eos=True)
    cancelled = submit(engine, gen_length=5)
    engine.step()
    engine.cancel(cancelled)
    run(engine)
    found = engine.histograms
    counts = {
        name: getattr(found, name).cumulative[-1]
        for name in ("queue_time", "time_to_first_token", "e2e_latency", "time_per_output_token")
    }
    assert counts == {
        "queue_time": 4,
        "time_to_first_token": 4,
        "e2e_latency": 3,
        "time_per_output_token": 3,
    }
    assert found.step_time.cumulative[-1] == found.step_requests.cumulative[-1] == 5
    assert found.step_requests.sum == 4 + 3 + 2 + 2 + 2
