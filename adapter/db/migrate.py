"""Upgrades a database to the schema of this release, or downgrades it before a rollback."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, inspect

from adapter.errors import SettingsError

MIGRATIONS = Path(__file__).with_name("migrations")
#: The revision of a database whose tables were made before they were versioned.
UNVERSIONED = "0001"


def is_current(connection: Connection) -> bool:
    """Whether the schema is up to date; takes no lock."""
    config = _config(connection)
    heads = ScriptDirectory.from_config(config).get_heads()
    return list(MigrationContext.configure(connection).get_current_heads()) == heads


def upgrade_schema(connection: Connection) -> None:
    """Apply the missing migrations in the connection's transaction, all or none.

    The caller holds a lock against other processes. Raises `SettingsError` for a schema of a later
    release.
    """
    config = _config(connection)
    tables = inspect(connection).get_table_names()
    if "jobs" in tables and "alembic_version" not in tables:
        command.stamp(config, UNVERSIONED)
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        head = ScriptDirectory.from_config(config).get_current_head()
        msg = f"DLLM_DATABASE_URL: the schema is not one this release (up to {head}) knows: {error}"
        raise SettingsError(msg) from error


def current_revision(connection: Connection) -> str | None:
    """The revision of the database's schema; None without one."""
    return MigrationContext.configure(connection).get_current_revision()


def downgrade_schema(connection: Connection, revision: str) -> None:
    """Go back to an earlier revision in the connection's transaction, all or none.

    The caller holds a lock against other processes. Raises `SettingsError` for a revision that is
    none of the earlier ones, or to which some step has no way back.
    """
    config = _config(connection)
    steps = [
        step
        for step in ScriptDirectory.from_config(config).walk_revisions()
        if revision < step.revision <= (current_revision(connection) or "")
    ]
    known = {step.down_revision for step in steps}
    if revision not in known:
        msg = f"the schema is at {current_revision(connection)}, and {revision} is none before it"
        raise SettingsError(msg)
    for step in steps:
        if not hasattr(step.module, "downgrade"):
            msg = f"there is no way back from {step.revision}: restore a backup made before it"
            raise SettingsError(msg)
    command.downgrade(config, revision)


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
