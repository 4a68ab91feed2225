"""Idempotency keys: a repeated submission gets the ids of the first one.

A client whose connection breaks cannot know whether its jobs were accepted. If it sent a key of its
own choice, it can submit again under the same key without creating jobs twice.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, and_, delete, exists, select, update

from adapter.db.dialects import insert_into, job_ids_of
from adapter.db.tables import jobs, submissions
from adapter.errors import KeyReused
from adapter.jobs.job import JobOptions
from adapter.types import Inputs


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """A submission under a key, which belongs to one API key."""

    owner: str
    key: str
    fingerprint: str

    @classmethod
    def of(cls, key: str, requests: Sequence[Inputs], options: JobOptions) -> "IdempotencyRecord":
        """Make the record; equal submissions have equal fingerprints."""
        body = [[dict(request) for request in requests], options.priority, options.timeout]
        if options.model is not None:  # earlier releases had no model in it
            body.append(options.model)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
        return cls(options.api_key or "", key, digest.hexdigest())


def find_ids(connection: Connection, record: IdempotencyRecord) -> list[int] | None:
    """The ids that the same submission got before, if there was one.

    Raises `KeyReused` if the key was used for another submission.
    """
    query = select(submissions).where(
        submissions.c.owner == record.owner, submissions.c.key == record.key
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    if row.fingerprint != record.fingerprint:
        msg = f"Idempotency-Key: {record.key!r} was used for another body"
        raise KeyReused(msg)
    ids: list[int] = json.loads(row.ids)
    return ids


def insert(connection: Connection, record: IdempotencyRecord, now: float) -> bool:
    """Store the record; False if there is one of its key.

    Waits for a transaction that is storing one, which then has its ids or is rolled back.
    """
    row = {
        "owner": record.owner,
        "key": record.key,
        "fingerprint": record.fingerprint,
        "created_at": now,
    }
    statement = insert_into(connection, submissions).values(row).on_conflict_do_nothing()
    return connection.execute(statement).rowcount == 1


def set_ids(connection: Connection, record: IdempotencyRecord, ids: Sequence[int]) -> None:
    """Complete the record with the ids of its jobs."""
    mine = and_(submissions.c.owner == record.owner, submissions.c.key == record.key)
    connection.execute(update(submissions).where(mine).values(ids=json.dumps(list(ids))))


def purge(connection: Connection, before: float) -> None:
    """Delete records older than this time whose jobs are deleted, too."""
    left = exists(select(jobs.c.id).where(jobs.c.id.in_(job_ids_of(connection))))
    connection.execute(delete(submissions).where(submissions.c.created_at < before, ~left))
