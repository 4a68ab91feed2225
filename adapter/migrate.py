"""Bring the database to this release's schema, or back to an earlier one.

    python -m adapter.migrate            # what the first worker of a release does at its start
    python -m adapter.migrate 0006       # before a rollback, once no worker of this release runs

Reads DLLM_DATABASE_URL. Writes a line to stdout. If the schema cannot be changed, the exit status
is 1 and the reason is on stderr.
"""

import argparse
import asyncio
import sys

from adapter.db.database import connect, migrate
from adapter.errors import AdapterError
from adapter.settings import load_settings


async def _migrate(revision: str | None) -> str:
    settings = load_settings()
    async with connect(settings.database_url, timeout=settings.database_timeout) as backend:
        before, after = await migrate(backend, revision)
    return f"schema {after}" if before == after else f"schema {before or 'none'} -> {after}"


def main() -> int:
    """Migrate the database that the environment names."""
    parser = argparse.ArgumentParser(prog="python -m adapter.migrate")
    parser.add_argument("revision", nargs="?", help="an earlier schema; default: this release's")
    revision = parser.parse_args().revision
    try:
        sys.stdout.write(f"{asyncio.run(_migrate(revision))}\n")
    except AdapterError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
