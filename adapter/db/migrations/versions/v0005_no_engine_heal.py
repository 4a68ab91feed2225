"""The adapter no longer replaces engines, so it records nothing about them."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Drop the table."""
    op.drop_table("engine_heal")
