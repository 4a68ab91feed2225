"""The job store against a real database."""

import asyncio
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from adapter_fakes import HandClock

from adapter.db.database import Database
from adapter.errors import KeyReused, TooManyJobs
from adapter.jobs.job import ClaimedJob, Job, JobOptions, JobState
from adapter.jobs.store import JobStore
from adapter.telemetry.metrics import JOBS_DONE
from adapter.types import Event, Usage

#: Each test that uses a database runs on both kinds.
DATABASES = ("sqlite", "postgresql")

DONE = Event("text", "stop", Usage(1, 2, 3, 4, 1), seed=5)


async def add(store: JobStore, count: int = 1) -> list[int]:
    return await store.add([{"text_input": f"p{n}"} for n in range(count)], max_queued=1000)


class Worker:
    """Claims jobs under its name, and ends the newest claim that it has of a job."""

    def __init__(self, store: JobStore, name: str) -> None:
        self._store = store
        self._name = name
        self.claims: dict[int, ClaimedJob] = {}

    async def claim(self, limit: int = 10) -> list[int]:
        """The ids of the claimed jobs."""
        claims = await self._store.claim(self._name, limit=limit, lease=30)
        self.claims |= {job.id: job for job in claims}
        return [job.id for job in claims]

    async def finish(self, job_id: int) -> bool:
        return await self._store.finish(self.claims[job_id], DONE)

    async def lose(self, *ids: int) -> None:
        for job_id in ids:
            assert await self._store.retry(self.claims[job_id], "lost")


@pytest.fixture
def a(store: JobStore) -> Worker:
    return Worker(store, "a")


@pytest.fixture
def b(store: JobStore) -> Worker:
    return Worker(store, "b")


async def state(store: JobStore, job_id: int) -> JobState:
    job = await store.get(job_id)
    assert job is not None
    return job.state


async def test_ids_begin_at_zero_and_have_no_gaps(store: JobStore) -> None:
    """The first job of a fresh database is 0, and every later one follows the one before."""
    assert [await add(store), await add(store, 3), await add(store)] == [[0], [1, 2, 3], [4]]


async def test_concurrent_submissions_get_distinct_ids(store: JobStore) -> None:
    """Submissions at the same time share no id, and those of a batch ascend."""
    batches = await asyncio.gather(*(add(store, 3) for _ in range(10)))

    assert list(range(30)) == sorted(job_id for batch in batches for job_id in batch)
    assert all(sorted(batch) == batch for batch in batches)


async def test_same_submission_is_made_once(store: JobStore) -> None:
    """A submission repeated under its key, even concurrently, makes its jobs once."""

    async def submit() -> tuple[list[int], bool]:
        return await store.add_once([{"seed": 1}, {}], key="k", max_queued=2)

    given = await asyncio.gather(*(submit() for _ in range(8)))
    assert [ids for ids, _ in given] == [[0, 1]] * 8
    assert sum(new for _, new in given) == 1
    # An accepted submission stays accepted, however full the queue is now.
    assert await submit() == ([0, 1], False)


async def test_refused_submission_leaves_its_key_free(store: JobStore) -> None:
    """A submission that the queue refused may be repeated under its key."""
    with pytest.raises(TooManyJobs):
        await store.add_once([{}] * 2, key="k", max_queued=1)
    assert await store.add_once([{}], key="k", max_queued=1) == ([0], True)


async def test_submission_keys_are_their_owners(store: JobStore) -> None:
    """The same idempotency key under another API key is another key."""
    for options, ids in (
        (JobOptions(), [0]),
        (JobOptions(api_key="a"), [1]),
        (JobOptions(api_key="b"), [2]),
    ):
        for new in (True, False):
            given = await store.add_once([{}], key="k", max_queued=9, options=options)
            assert given == (ids, new)


async def test_submission_keys_live_as_long_as_their_jobs(
    store: JobStore, clock: HandClock, a: Worker
) -> None:
    """A key is kept for its time to live and for as long as any of its jobs is there."""
    await store.add_once([{}, {}], key="k", max_queued=9)
    await a.claim()
    await a.finish(0)

    async def later() -> tuple[list[int], bool]:
        clock.advance(11)
        await store.purge(ttl=10, limit=9)
        await store.purge_idempotency_keys(ttl=10)
        return await store.add_once([{}, {}], key="k", max_queued=9)

    assert await later() == ([0, 1], False)
    await a.finish(1)
    assert await later() == ([2, 3], True)


async def test_submission_keys_are_kept_for_their_time(store: JobStore, clock: HandClock) -> None:
    """A key whose job is gone, as it may be soon after it ended, is kept for its time to live."""
    await store.add_once([{}], key="k", max_queued=9)
    await store.cancel(0)
    clock.advance(10)
    await store.purge(ttl=5, limit=9)
    await store.purge_idempotency_keys(ttl=10)
    assert await store.get(0) is None
    with pytest.raises(KeyReused):
        await store.add_once([{"seed": 1}], key="k", max_queued=9)
    clock.advance(1)
    await store.purge_idempotency_keys(ttl=10)
    assert await store.add_once([{"seed": 1}], key="k", max_queued=9) == ([1], True)


async def test_batch_that_exceeds_the_queue_is_refused_whole(store: JobStore) -> None:
    """A batch that exceeds the queue's limit makes no job and uses no id."""
    await store.add([{}] * 2, max_queued=3)

    with pytest.raises(TooManyJobs, match="2 jobs are waiting, and at most 3 may"):
        await store.add([{}] * 2, max_queued=3)

    assert await store.add([{}], max_queued=3) == [2]


async def test_running_jobs_do_not_count_as_queued(store: JobStore, a: Worker) -> None:
    """The queue's limit counts queued jobs only."""
    await store.add([{}] * 3, max_queued=3)
    await a.claim(limit=1)

    assert await store.add([{}], max_queued=3) == [3]


@pytest.mark.parametrize("job_id", [0, -1, 2**63, 10**30])
async def test_unknown_id_gives_none(store: JobStore, job_id: int) -> None:
    """An id that no job has gives None, whatever its size."""
    assert await store.get(job_id) is None
    assert not await store.cancel(job_id)


async def test_claim_takes_the_oldest_first_and_no_more_than_asked(
    store: JobStore, a: Worker, b: Worker
) -> None:
    """Jobs are claimed in the order of their ids, each by one owner only."""
    await add(store, 5)

    assert await a.claim(limit=2) == [0, 1]
    assert await b.claim(limit=2) == [2, 3]
    assert await a.claim() == [4]
    assert await b.claim() == []


async def test_claimed_job_has_its_request_and_options(store: JobStore, clock: HandClock) -> None:
    """A claimed job has the submitted inputs and options, and the time left to its deadline."""
    request = {"messages": "[ü]", "temperature": 0.5, "stop": ["a"], "ignore_eos": True}
    options = JobOptions(
        3, 60.0, "team", "call-1", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b71-01"
    )
    await store.add([request], max_queued=10, options=options)
    clock.advance(20)

    expected = ClaimedJob(0, "a", request, 0, options, time_left=40.0, waited=20.0)
    assert [expected] == await store.claim("a", limit=1, lease=30)


async def test_urgent_jobs_come_first(store: JobStore, a: Worker) -> None:
    """Claims go by priority first and by age second."""
    for priority in (3, 2, 1, 2, 1):
        await store.add([{}], max_queued=10, options=JobOptions(priority=priority))

    assert [await a.claim(limit=2), await a.claim()] == [[2, 4], [1, 3, 0]]


async def test_finish_keeps_the_result(store: JobStore, a: Worker) -> None:
    """A finished job has its text and stays as it is."""
    await add(store)
    await a.claim()

    assert await a.finish(0)
    assert Job(0, JobState.FINISHED, 0, "text", None) == await store.get(0)
    assert not await a.finish(0)
    assert not await store.cancel(0)


async def changes(store: JobStore, job: ClaimedJob) -> list[bool]:
    """Which ways to end a claim change the job."""
    return [
        await store.finish(job, DONE),
        await store.fail(job, "no"),
        await store.retry(job, "no"),
        await store.release(job),
    ]


async def test_only_the_owner_of_a_running_job_changes_it(store: JobStore, a: Worker) -> None:
    """A worker that is not the owner, or comes too late, changes nothing and is told so."""
    await add(store)
    await a.claim()
    assert not any(await changes(store, replace(a.claims[0], owner="b")))
    assert await state(store, 0) == JobState.RUNNING

    assert await store.release(a.claims[0])
    assert not any(await changes(store, a.claims[0]))
    assert await state(store, 0) == JobState.QUEUED


@pytest.mark.parametrize("end", ["lease", "engine", "release"])
async def test_an_old_claim_does_not_end_a_newer_one(
    store: JobStore, clock: HandClock, a: Worker, end: str
) -> None:
    """A worker that claims a job again cannot end the new claim by the outcome of the old run."""
    await add(store)
    await a.claim()
    old = a.claims[0]
    clock.advance(31)
    if end == "lease":
        await store.requeue_expired()
    elif end == "engine":
        await a.lose(0)
    else:
        await store.release(old)
    assert await a.claim() == [0]

    assert not any(await changes(store, old))
    assert await state(store, 0) == JobState.RUNNING
    assert await a.finish(0)


async def test_renewal_returns_the_jobs_still_owned(store: JobStore, a: Worker, b: Worker) -> None:
    """A renewal leaves out jobs that were cancelled, finished, or are another worker's."""
    await add(store, 4)
    await a.claim(limit=3)
    await b.claim()
    await store.cancel(1)
    await a.finish(2)

    assert {0} == await store.renew("a", [0, 1, 2, 3], lease=30)


async def test_expired_lease_frees_the_job(
    store: JobStore, clock: HandClock, a: Worker, b: Worker
) -> None:
    """A job whose lease has expired is requeued; a renewed one is not."""
    await add(store, 2)
    await a.claim()
    clock.advance(20)
    await store.renew("a", [1], lease=30)
    clock.advance(20)

    assert await store.requeue_expired() == 1
    assert await b.claim() == [0]
    assert not await a.finish(0)
    assert await b.finish(0)


@pytest.mark.parametrize(("ahead", "lost"), [(28.0, 0), (31.0, 1)])
async def test_clocks_of_machines_may_differ_by_less_than_what_is_left_of_a_lease(
    store: JobStore, database: Database, clock: HandClock, ahead: float, lost: int, a: Worker
) -> None:
    """A lease renewed every second holds while clocks differ by less than the lease."""
    await add(store)
    await a.claim()
    clock.advance(1)
    other = JobStore(database, max_attempts=3, clock=lambda: clock() + ahead)

    assert await other.requeue_expired() == lost


async def test_deaths_of_workers_cost_no_attempt_but_end(
    store: JobStore, clock: HandClock, a: Worker
) -> None:
    """A job survives many deaths of its workers, but not MAX_RESCUES of them."""
    await add(store)
    for _ in range(20):
        assert await a.claim() == [0]
        clock.advance(60)
        assert await store.requeue_expired() == 1

    error = "given up: 20 workers have died that ran it"
    assert Job(0, JobState.FAILED, 0, None, error) == await store.get(0)


async def test_each_run_of_a_job_has_a_name_of_its_own(store: JobStore, clock: HandClock) -> None:
    """Even for a worker that lost it for a while: what ends the one run there spares the other.

    A lookup of the job returns the name too.
    """
    names = []
    await add(store)
    for end in ("lease", "engine", "lease"):
        (job,) = await store.claim("a", limit=1, lease=30)
        shown = await store.get(0)
        assert shown is not None
        assert shown.engine_request_id == job.engine_request_id
        names.append(job.engine_request_id)
        if end == "engine":
            assert await store.retry(job, "lost")
        else:
            clock.advance(31)
            assert await store.requeue_expired() == 1

    assert len(set(names)) == 3


async def test_few_suspects_run_at_a_time(store: JobStore, a: Worker, b: Worker) -> None:
    """After an engine died, its jobs are retried a few at a time, beside new ones."""
    await add(store, 12)
    await a.lose(*await a.claim(limit=20))
    await add(store, 3)

    assert await a.claim(limit=20) == [*range(8), 12, 13, 14]
    assert await b.claim(limit=20) == []
    await a.finish(0)
    assert await b.claim(limit=20) == [8]


async def test_last_attempt_runs_alone(store: JobStore, a: Worker, b: Worker) -> None:
    """The last attempt of a job runs alone: no job is claimed before or beside it."""
    await add(store, 2)
    for _ in range(2):
        await a.claim(limit=1)
        await a.lose(0)
    assert await a.claim() == [0]
    assert await b.claim() == []
    await store.release(a.claims[0])

    await store.cancel(0)
    await add(store, 1)
    assert await a.claim(limit=1) == [1]
    await a.lose(1)
    assert await a.claim(limit=1) == [1]
    assert await b.claim() == [2]
    await a.lose(1)
    assert await a.claim() == []  # 2 is running
    await b.finish(2)
    assert await a.claim() == [1]
    await a.finish(1)


async def test_job_that_may_run_once_only_does_not_wait(database: Database) -> None:
    """If jobs have only one attempt, a new job does not run alone."""
    store = JobStore(database, max_attempts=1)
    a = Worker(store, "a")
    await add(store, 2)

    assert await a.claim() == [0, 1]
    await a.lose(0)
    assert await state(store, 0) == JobState.FAILED


async def test_overdue_jobs_fail_in_the_queue(store: JobStore, clock: HandClock, a: Worker) -> None:
    """An overdue queued job is not claimed; it fails with an error that names the timeout."""
    await store.add([{}], max_queued=10, options=JobOptions(timeout=2.5))
    await add(store)
    assert await store.fail_overdue() == 0
    clock.advance(3)

    assert await a.claim() == [1]
    assert [await store.fail_overdue(), await store.fail_overdue()] == [1, 0]
    error = "timeout: the job was not done within 2.5 s"
    assert Job(0, JobState.FAILED, 0, None, error) == await store.get(0)


async def test_jobs_are_their_keys_alone(store: JobStore) -> None:
    """With an API key, jobs of other keys can neither be read nor cancelled."""
    for name in ("one", "two", None):
        await store.add([{}], max_queued=10, options=JobOptions(api_key=name))

    assert [await store.get(n, api_key="one") is not None for n in range(3)] == [True, False, False]
    assert not await store.cancel(1, api_key="one")
    assert await store.cancel(0, api_key="one")
    assert await store.get(1) is not None


async def test_active_jobs_are_counted(store: JobStore, a: Worker) -> None:
    """Only queued and running jobs are counted."""
    assert not await store.count_active()
    await add(store, 4)
    await a.claim(limit=2)
    await a.finish(0)

    assert await store.count_active() == {
        (JobState.QUEUED, "dllm"): 2,
        (JobState.RUNNING, "dllm"): 1,
    }


async def test_retry_counts_and_release_does_not(store: JobStore, a: Worker) -> None:
    """A retry counts as an attempt, a release does not."""
    await add(store)
    await a.claim()
    await store.release(a.claims[0])
    assert Job(0, JobState.QUEUED, 0, None, None) == await store.get(0)

    await a.claim()
    await a.lose(0)
    assert Job(0, JobState.QUEUED, 1, None, None) == await store.get(0)


async def test_last_retry_fails_with_the_reason(store: JobStore, a: Worker) -> None:
    """A retry after the last attempt fails the job with the reason."""
    await add(store)
    for _ in range(3):
        await a.claim()
        await a.lose(0)

    assert Job(0, JobState.FAILED, 3, None, "given up after 3 attempts: lost") == await store.get(0)


async def test_cancel_is_idempotent(store: JobStore, a: Worker) -> None:
    """Queued and running jobs can be cancelled, once; their worker cannot finish them."""
    await add(store, 2)
    await a.claim(limit=1)

    assert [await store.cancel(0), await store.cancel(1)] == [True, True]
    assert [await store.cancel(0), await store.cancel(1)] == [False, False]
    assert not await a.finish(0)
    assert await a.claim() == []
    assert await state(store, 0) == JobState.CANCELLED


async def test_done_among_returns_final_jobs(store: JobStore, a: Worker) -> None:
    """Of the given ids, those in a final state come back."""
    await add(store, 4)
    await a.claim(limit=3)
    await a.finish(0)
    await store.cancel(1)

    assert {0, 1} == await store.done_among([0, 1, 2, 3, 99])


async def test_old_results_are_removed_in_small_batches(
    store: JobStore, clock: HandClock, a: Worker
) -> None:
    """Only results older than their time to live are deleted, and no id is used again."""
    await add(store, 4)
    await a.claim(limit=3)
    for job_id in range(3):
        await a.finish(job_id)
    clock.advance(100)

    assert await store.purge(ttl=101, limit=2) == 0
    assert [await store.purge(ttl=99, limit=2) for _ in range(3)] == [2, 1, 0]
    assert await store.get(2) is None
    assert await state(store, 3) == JobState.QUEUED
    assert await add(store) == [4]


WORKER = """
import asyncio, sys
from adapter.db.database import Database
from adapter.jobs.store import JobStore

async def main(url, name):
    async with Database.open(url) as database:
        store = JobStore(database, max_attempts=3)
        ids = await store.add([{"n": 1}] * 20, max_queued=1000)
        taken = []
        for _ in range(10):
            taken += [job.id for job in await store.claim(name, limit=3, lease=60)]
        print(ids[0], *taken)

asyncio.run(main(*sys.argv[1:]))
"""


def test_processes_may_start_at_once_on_a_fresh_database(database_url: str) -> None:
    """The schema is made once, every submission gets its own ids, and no job has two owners."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, database_url, f"worker-{n}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    outputs = [worker.communicate(timeout=60) for worker in workers]

    assert [error for _, error in outputs] == ["", "", ""]
    numbers = [[int(word) for word in output.split()] for output, _ in outputs]
    assert sorted(first for first, *_ in numbers) == [0, 20, 40]
    taken = [job_id for _, *ids in numbers for job_id in ids]
    assert len(taken) == len(set(taken))


async def test_two_stores_see_the_same_jobs(database_url: str, store: JobStore) -> None:
    """Another worker reads a write at once."""
    await add(store)
    async with Database.open(database_url) as other:
        assert await state(JobStore(other, max_attempts=3), 0) == JobState.QUEUED


class Ended:
    """Counts jobs by final state from now on."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> Counter[str]:
        (family,) = JOBS_DONE.collect()
        return Counter(
            {s.labels["state"]: int(s.value) for s in family.samples if s.name.endswith("_total")}
        )

    @property
    def counts(self) -> dict[str, int]:
        return dict(self._now() - self._before)


async def test_each_job_that_ends_is_counted_once(store: JobStore, a: Worker) -> None:
    """Each job counts once when it ends, whether it was queued or running."""
    ended = Ended()
    await add(store, 4)
    await a.claim(limit=3)
    for _ in range(2):
        await a.finish(0)
        await store.fail(a.claims[1], "steps: no")
        await store.cancel(2)
        await store.cancel(3)
        await a.finish(2)

    assert ended.counts == {"finished": 1, "failed": 1, "cancelled": 2}


async def test_jobs_that_are_given_up_are_counted(
    store: JobStore, clock: HandClock, a: Worker
) -> None:
    """The last attempt or the last rescue counts as a failure; the earlier ones do not count."""
    ended = Ended()
    await add(store)
    for left in (2, 1, 0):
        await a.claim()
        await a.lose(0)
        assert ended.counts == ({} if left else {"failed": 1})

    await add(store)
    for left in reversed(range(20)):
        await a.claim()
        clock.advance(60)
        await store.requeue_expired()
        assert ended.counts == ({"failed": 1} if left else {"failed": 2})


async def test_overdue_jobs_are_counted_once_by_all_workers(
    store: JobStore, clock: HandClock
) -> None:
    """If many workers find the same overdue jobs, each job counts as one failure."""
    ended = Ended()
    await store.add([{}] * 30, max_queued=100, options=JobOptions(timeout=1))
    await add(store)
    clock.advance(2)
    expired = await asyncio.gather(*(store.fail_overdue() for _ in range(5)))

    assert sum(expired) == 30
    assert ended.counts == {"failed": 30}
