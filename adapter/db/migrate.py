"""Bringing a database to the schema of this release."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, inspect

from adapter.errors import SettingsError

MIGRATIONS = Path(__file__).with_name("migrations")
#: What a database has whose tables were made before they were versioned.
UNVERSIONED = "0001"


def is_current(connection: Connection) -> bool:
    """Whether there is nothing to upgrade; asked without a lock, so that nobody is held up."""
    config = _config(connection)
    heads = ScriptDirectory.from_config(config).get_heads()
    return list(MigrationContext.configure(connection).get_current_heads()) == heads


def upgrade_schema(connection: Connection) -> None:
    """Apply what is missing, in the connection's transaction: all of it, or nothing.

    The caller holds a lock that keeps other processes out. Raises `SettingsError` for a database
    that a later release has changed.
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


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
