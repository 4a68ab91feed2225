"""PostgreSQL numbers jobs by a sequence: a counter's row made submissions wait for each other.

A submission's ids need no longer be consecutive, so its record lists them.
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

submissions = sa.table("submissions", *map(sa.column, ("owner", "key", "ids", "first_id", "jobs")))


def upgrade() -> None:
    """Continue the counter's ids; list those of the submissions that are kept."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        counter = "SELECT next_id FROM counters WHERE name = 'jobs'"
        next_id = connection.scalar(sa.text(counter))
        op.execute(f"CREATE SEQUENCE job_ids MINVALUE 0 START {int(next_id or 0)}")
        op.execute("DELETE FROM counters WHERE name = 'jobs'")
    op.add_column("submissions", sa.Column("ids", sa.Text, nullable=False, server_default="[]"))
    for row in connection.execute(sa.select(submissions)).all():
        ids = json.dumps(list(range(row.first_id, row.first_id + row.jobs)))
        mine = (submissions.c.owner == row.owner, submissions.c.key == row.key)
        connection.execute(sa.update(submissions).where(*mine).values(ids=ids))
    with op.batch_alter_table("submissions") as batch:
        batch.drop_column("first_id")
        batch.drop_column("jobs")
