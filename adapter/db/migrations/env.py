"""Gives alembic the connection of `adapter.db.migrate`, inside a transaction."""

from alembic import context

from adapter.db.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite cannot alter most of a table in place
)
with context.begin_transaction():
    context.run_migrations()
