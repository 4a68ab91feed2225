"""Jobs remember their model."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column; earlier jobs, and those of earlier workers, are for the default model."""
    op.add_column("jobs", sa.Column("model", sa.String(255)))


def downgrade() -> None:
    """Drop the column."""
    with op.batch_alter_table("jobs") as batch:
        batch.drop_column("model")
