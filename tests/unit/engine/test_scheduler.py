"""Who takes the next step: budgets, turns and slots."""

from dllm_engine.request import Prompt, SamplingParams
from dllm_engine.scheduler import Request, Scheduler
from hypothesis import given
from hypothesis import strategies as st


def make(request_id: int, rows: int) -> Request:
    """A request of `rows` tokens."""
    return Request(request_id, Prompt([0] * (rows - 1)), SamplingParams(gen_length=1))


def ids(requests: list[Request]) -> list[int]:
    """Their ids, in order."""
    return [r.request_id for r in requests]


def loaded(num_slots: int, budget: int, rows: list[int]) -> Scheduler:
    """A scheduler with requests 0, 1, … of these sizes admitted."""
    scheduler = Scheduler(num_slots, budget)
    for i, size in enumerate(rows):
        scheduler.add(make(i, size))
    scheduler.admit()
    return scheduler


def test_admission_is_first_come_first_served_and_bounded_by_slots() -> None:
    """Requests get slots in order of arrival; the rest wait for the first free one."""
    scheduler = Scheduler(2, 100)
    requests = [make(i, 10) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    assert ids(scheduler.admit()) == [0, 1]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)
    scheduler.remove(requests[0])
    assert ids(scheduler.admit()) == [2]


def test_a_step_fills_the_budget_and_the_passed_over_go_first_next_time() -> None:
    """Smaller requests fill what a larger one leaves; who was passed over leads the next step."""
    scheduler = loaded(4, 100, [60, 60, 30, 20])
    assert ids(scheduler.schedule()) == [0, 2]
    assert ids(scheduler.schedule()) == [1, 3]
    assert ids(scheduler.schedule()) == [0, 2]


def test_an_oversized_request_runs_alone_and_blocks_nobody() -> None:
    """Larger than the budget: a step of its own when its turn comes, others in between."""
    scheduler = loaded(3, 100, [40, 500, 40])
    assert ids(scheduler.schedule()) == [0, 2]
    assert ids(scheduler.schedule()) == [1]
    assert ids(scheduler.schedule()) == [0, 2]


def test_guidance_counts_twice() -> None:
    """A request with guidance pushes its rows twice and is charged for both."""
    request = Request(0, Prompt([0] * 9), SamplingParams(gen_length=1, cfg_scale=1.0))
    assert request.rows_per_step == 20


def test_a_waiting_request_can_be_removed() -> None:
    """Cancelling before admission leaves slots and queue whole."""
    scheduler = Scheduler(1, 10)
    requests = [make(0, 5), make(1, 5)]
    for request in requests:
        scheduler.add(request)
    scheduler.admit()
    scheduler.remove(requests[1])
    scheduler.check_integrity()
    assert scheduler.num_waiting == 0


@given(
    sizes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 6)), min_size=1, max_size=25),
    num_slots=st.integers(1, 8),
    budget=st.integers(1, 150),
    arrivals=st.data(),
)
def test_nobody_starves_and_no_step_is_wasted(
    sizes: list[tuple[int, int]], num_slots: int, budget: int, arrivals: st.DataObject
) -> None:
    """Over random arrivals: every running request steps at least once in any `num_slots` steps,
    steps stay in budget (or hold one request), and a step is empty only if nothing runs."""
    scheduler = Scheduler(num_slots, budget)
    pending = [(make(i, rows), steps) for i, (rows, steps) in enumerate(sizes)]
    left: dict[int, int] = {}
    idle: dict[int, int] = {}
    running: dict[int, Request] = {}
    while pending or left:
        for _ in range(arrivals.draw(st.integers(0, 3)) if left else 1):
            if pending:
                request, steps = pending.pop()
                scheduler.add(request)
                left[request.request_id] = steps
        for request in scheduler.admit():
            running[request.request_id], idle[request.request_id] = request, 0
        chosen = scheduler.schedule()
        scheduler.check_integrity()
        assert chosen or not running
        assert len(chosen) == 1 or sum(r.rows_per_step for r in chosen) <= budget
        for i in running:
            idle[i] = 0 if i in ids(chosen) else idle[i] + 1
            assert idle[i] < num_slots
        for request in chosen:
            left[request.request_id] -= 1
            if left[request.request_id] == 0:
                scheduler.remove(request)
                del left[request.request_id], running[request.request_id]
