"""The simulation of a fleet (benchmarks/fleet.py)."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.fleet import (
    ENGINE_SECONDS,
    RATES,
    RESULTS,
    Costs,
    Size,
    simulate,
    size_for,
    stored,
    walls,
)

COSTS = Costs(adapter_job=0.004, database_job=0.001, adapter_event=0.0005, jobs_per_second=100)


def test_one_job_at_a_time_waits_for_nothing() -> None:
    """With idle parts a job takes its own work and no more."""
    idle = Size(rate=1, workers=50, database_cores=50, engines=50)
    assert max(simulate(idle, COSTS, arrivals=100)) < 0.02


def test_too_few_of_a_part_make_jobs_wait() -> None:
    """Whichever part has less capacity than the load, waits grow with time."""
    size = size_for(200, COSTS)
    enough = statistics.median(simulate(size, COSTS, arrivals=2000))
    assert enough < 0.1
    # Half of what its load needs: 200 jobs cost 0.8 s of workers, 0.2 s of the database.
    slow = replace(COSTS, adapter_job=2 * size.workers / 200)
    assert statistics.median(simulate(size, slow, arrivals=2000)) > 10 * enough
    slow = replace(COSTS, database_job=2 * size.database_cores / 200)
    assert statistics.median(simulate(size, slow, arrivals=2000)) > 10 * enough
    few = replace(size, engines=size.engines // 2)
    late = simulate(few, COSTS, arrivals=2000)
    assert late[-1] > ENGINE_SECONDS > late[0]


def test_the_first_wall_is_the_lowest() -> None:
    """Walls are told in the order in which they are met."""
    found = list(walls(COSTS).values())
    assert found == sorted(found)
    assert found[0] == 150


def test_the_page_has_the_table_of_the_measured_costs() -> None:
    """docs/operate.md has the stored table, whose sizes follow from the stored costs."""
    kept = json.loads((RESULTS / "fleet.json").read_text())["table"]
    assert kept in (Path(__file__).parents[2] / "docs/operate.md").read_text()
    for rate, row in zip(RATES, kept.splitlines()[2:], strict=True):
        size = size_for(rate, stored())
        assert row.startswith(f"| {rate:,} | {size.workers} | {size.connections} |")
