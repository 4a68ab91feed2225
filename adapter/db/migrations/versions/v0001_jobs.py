"""Jobs, their counter, and a record of each engine; the first databases have this unversioned."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

JobId = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "jobs",
        sa.Column("id", JobId, primary_key=True, autoincrement=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("finish_reason", sa.String(16)),
        sa.Column("prompt_tokens", sa.Integer),
        sa.Column("completion_tokens", sa.Integer),
        sa.Column("steps", sa.Integer),
        sa.Column("forward_passes", sa.Integer),
        sa.Column("seed", sa.BigInteger),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("owner", sa.String(160)),
        sa.Column("lease_expires", sa.Double),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("finished_at", sa.Double),
    )
    op.create_index("ix_jobs_state", "jobs", ["state", "id"])
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"])
    counters = op.create_table(
        "counters",
        sa.Column("name", sa.String(16), primary_key=True),
        sa.Column("next_id", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(counters, [{"name": "jobs", "next_id": 0}])
    op.create_table(
        "engine_heal",
        sa.Column("engine", sa.String(255), primary_key=True),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("healer", sa.String(160)),
        sa.Column("lease_expires", sa.Double),
        sa.Column("last_life", sa.Double, nullable=False),
    )
