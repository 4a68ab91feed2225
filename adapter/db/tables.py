"""The SQL schema of this release; `adapter/db/migrations` has the steps to it."""

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    Sequence,
    String,
    Table,
    Text,
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
    Column("attempts", Integer, nullable=False),  # runs that the engine began and lost
    Column("owner", String(160)),  # the worker that runs the job
    Column("lease_expires", Double),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("num_rescues", Integer, nullable=False, server_default="0"),  # expired leases
    Column("priority", Integer, nullable=False, server_default="2"),  # 1 is first, 3 last
    Column("deadline", Double),  # until the job is done
    Column("api_key", String(64)),  # name of the key that submitted it
    Column("request_id", String(128)),  # X-Request-ID of the call that submitted it
    Column("traceparent", String(64)),  # W3C trace context of that call
    Column("cached_tokens", Integer),  # of the prompt, from the prefix cache
    Column("tokens", Text),  # JSON: `Event.tokens`
    Column("model", String(255)),  # its name at Triton; NULL: the default model
    Index("ix_jobs_queue", "state", "attempts", "priority", "id"),
    Index("ix_jobs_finished_at", "finished_at"),
    Index("ix_jobs_deadline", "deadline"),
)

# Ids start at 0. SQLite counts them in a row, PostgreSQL by a sequence: a row would make each
# submission wait for those before it. A transaction that fails there leaves a gap.
job_ids = Sequence("job_ids", minvalue=0, start=0, metadata=metadata)
counters = Table(
    "counters",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("next_id", BigInteger, nullable=False),
)

# One row for each call that submitted jobs under an Idempotency-Key.
submissions = Table(
    "submissions",
    metadata,
    Column("owner", String(64), primary_key=True),  # name of the API key; "" without keys
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),  # SHA-256 of what was asked
    Column("created_at", Double, nullable=False),
    Column("ids", Text, nullable=False, server_default="[]"),  # JSON: of its jobs
    Index("ix_submissions_created_at", "created_at"),
)

# One row for each caller and limit.
rate_limits = Table(
    "rate_limits",
    metadata,
    Column("key", String(255), primary_key=True),
    Column("calls", Integer, nullable=False),
    Column("expires", Double, nullable=False),  # when the window is over
    Index("ix_rate_limits_expires", "expires"),
)
