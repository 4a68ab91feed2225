"""Keys, priorities, deadlines and traces of jobs; attempts counted when lost; rate limits.

Every new column has a default, so that older workers can go on until they are replaced.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns, indexes and the table of rate limits."""
    for column in (
        sa.Column("orphaned", sa.Integer, nullable=False, server_default="0"),
        sa.Column("priority", sa.Integer, nullable=False, server_default="2"),
        sa.Column("deadline", sa.Double),
        sa.Column("api_key", sa.String(64)),
        sa.Column("request_id", sa.String(128)),
        sa.Column("traceparent", sa.String(64)),
    ):
        op.add_column("jobs", column)
    op.create_index("ix_jobs_queue", "jobs", ["state", "attempts", "priority", "id"])
    op.create_index("ix_jobs_deadline", "jobs", ["deadline"])
    op.drop_index("ix_jobs_state", "jobs")
    # An attempt used to count when it began; now it counts when the engine loses it.
    op.execute("UPDATE jobs SET attempts = attempts - 1 WHERE state = 'running' AND attempts > 0")
    op.create_table(
        "rate_limits",
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("calls", sa.Integer, nullable=False),
        sa.Column("expires", sa.Double, nullable=False),
    )
    op.create_index("ix_rate_limits_expires", "rate_limits", ["expires"])
