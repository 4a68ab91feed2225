"""Results tell how many tokens of the prompt the prefix cache had."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the column; earlier results, and those of earlier workers, have none."""
    op.add_column("jobs", sa.Column("cached_tokens", sa.Integer))


def downgrade() -> None:
    """Drop the column."""
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("cached_tokens")
