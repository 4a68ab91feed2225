"""Submissions that may be made twice: the ids under which a key was used, and for what.

A caller whose connection breaks cannot know whether its jobs were accepted. With a key of its own
choice it asks again, and is told the ids of the first time.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from adapter.db.tables import submissions
from adapter.errors import KeyReused
from adapter.jobs.job import Terms
from adapter.types import Inputs


@dataclass(frozen=True, slots=True)
class Submission:
    """What one call submits, under a key that is its owner's alone."""

    owner: str
    key: str
    fingerprint: str

    @classmethod
    def of(cls, key: str, requests: Sequence[Inputs], terms: Terms) -> "Submission":
        """The fingerprint is the same for bodies that ask for the same."""
        asked = [[dict(request) for request in requests], terms.priority, terms.timeout]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
        return cls(terms.api_key or "", key, digest.hexdigest())


def ids_of(connection: Connection, submission: Submission) -> list[int] | None:
    """The ids that this submission was given before, if it was made before.

    Raises `KeyReused` where the key stands for another one.
    """
    query = select(submissions).where(
        submissions.c.owner == submission.owner, submissions.c.key == submission.key
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    if row.fingerprint != submission.fingerprint:
        msg = f"Idempotency-Key: {submission.key!r} was used for another body"
        raise KeyReused(msg)
    return list(range(row.first_id, row.first_id + row.jobs))


def remember(
    connection: Connection, submission: Submission, ids: Sequence[int], now: float
) -> None:
    """Keep the ids, which are consecutive."""
    row = {
        "owner": submission.owner,
        "key": submission.key,
        "fingerprint": submission.fingerprint,
        "first_id": ids[0],
        "jobs": len(ids),
        "created_at": now,
    }
    connection.execute(insert(submissions).values(row))


def forget(connection: Connection, before: float) -> None:
    """Forget what was submitted before this time."""
    connection.execute(delete(submissions).where(submissions.c.created_at < before))
