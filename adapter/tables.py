"""The SQL schema."""

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    insert,
    select,
)

metadata = MetaData()

# SQLite makes only an INTEGER key its row id.
JobId = BigInteger().with_variant(Integer, "sqlite")

jobs = Table(
    "jobs",
    metadata,
    Column("id", JobId, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("request", Text, nullable=False),  # JSON: the inputs of the Triton model
    Column("text", Text),
    Column("error", Text),
    Column("finish_reason", String(16)),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("steps", Integer),
    Column("forward_passes", Integer),
    Column("seed", BigInteger),
    Column("attempts", Integer, nullable=False),
    Column("owner", String(160)),  # the worker that drives the job
    Column("lease_expires", Double),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Index("ix_jobs_state", "state", "id"),
    Index("ix_jobs_finished_at", "finished_at"),
)

# Ids start at 0 and have no gaps, which neither database's own sequences promise.
counters = Table(
    "counters",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("next_id", BigInteger, nullable=False),
)

engine_heal = Table(
    "engine_heal",
    metadata,
    Column("engine", String(255), primary_key=True),
    Column("epoch", Integer, nullable=False),  # how often this engine was replaced
    Column("healer", String(160)),  # the worker that is replacing it now
    Column("lease_expires", Double),
    Column("last_life", Double, nullable=False),  # when any worker last heard from it
)


def create_schema(connection: Connection) -> None:
    """Make what is missing. The caller holds a lock that keeps other processes out."""
    metadata.create_all(connection)
    if connection.execute(select(counters.c.name)).first() is None:
        connection.execute(insert(counters).values(name="jobs", next_id=0))
