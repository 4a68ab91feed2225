"""Rename the counter of expired leases."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Rename the column."""
    op.execute("ALTER TABLE jobs RENAME COLUMN orphaned TO num_rescues")
