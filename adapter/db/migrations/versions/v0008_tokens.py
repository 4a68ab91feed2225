"""Results have log-probabilities and steps of commit, where a request asks for them."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column; earlier results, and those of earlier workers, have none."""
    op.add_column("jobs", sa.Column("tokens", sa.Text))


def downgrade() -> None:
    """Drop the column."""
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("tokens")
