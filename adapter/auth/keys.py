"""API keys and their names. `python -m adapter.auth.keys new NAME` makes one.

Only SHA-256 hashes are stored. A key has 256 random bits, so a slow hash or a salt would add
nothing. Several keys may share a name, so you can replace a key without downtime.
"""

import argparse
import hashlib
import hmac
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapter.errors import SettingsError
from adapter.telemetry.logs import get_logger

log = get_logger()

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HASH = re.compile(r"[0-9a-f]{64}")

Signature = tuple[int, int, int]


class Keyring:
    """The keys from the settings, and from a file that is read again whenever it changes.

    Raises `SettingsError` for an invalid entry, without repeating it: it may hold a key in the
    place of its hash.
    """

    def __init__(self, keys: str = "", file: Path | None = None) -> None:
        self._fixed = _parsed("DLLM_API_KEYS", keys.split(","))
        self._file = file
        self._signature: Signature | None = None
        self._from_file: list[tuple[str, bytes]] = []
        if file is not None:
            try:
                self._read(file)
            except OSError as error:
                msg = f"DLLM_API_KEYS_FILE: {error}"
                raise SettingsError(msg) from error

    @property
    def required(self) -> bool:
        """Whether calls need a key. An empty file of keys admits no call."""
        return bool(self._fixed) or self._file is not None

    def name_of(self, key: str) -> str | None:
        """The name of the key, or None if it is unknown."""
        self._read_again()
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        found = None
        for name, known in (*self._fixed, *self._from_file):
            # No early exit: the time must not depend on which key matches.
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _read_again(self) -> None:
        """Read the file again if it has changed; keep the present keys if it is invalid."""
        if self._file is None:
            return
        try:
            self._read(self._file)
        except SettingsError as error:
            log.error("api_keys_not_read", error=str(error))
        except OSError as error:
            if self._signature is not None:
                log.error("api_keys_not_read", error=str(error))
            self._signature = None

    def _read(self, file: Path) -> None:
        status = file.stat()
        signature = (status.st_mtime_ns, status.st_size, status.st_ino)
        if signature == self._signature:
            return
        self._signature = signature
        self._from_file = _parsed(str(file), file.read_text(errors="replace").splitlines())


def _parsed(source: str, lines: Sequence[str]) -> list[tuple[str, bytes]]:
    return list(_entries(source, lines))


def _entries(source: str, lines: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        name, _, digest = entry.partition(":")
        if not NAME.fullmatch(name) or not HASH.fullmatch(digest):
            msg = (
                f"{source}: entry {number} must be name:hash, a name of up to 64 letters, digits "
                "and ._-, and the key's SHA-256 in lower-case hexadecimal"
            )
            raise SettingsError(msg)
        yield name, bytes.fromhex(digest)


def new_key() -> str:
    """Make a random key."""
    return f"dllm-{secrets.token_urlsafe(32)}"


def entry_of(name: str, key: str) -> str:
    """The entry that admits the key. Raises ValueError for an invalid name."""
    if not NAME.fullmatch(name):
        msg = "a name has up to 64 letters, digits and ._-"
        raise ValueError(msg)
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"


def append_entry(path: Path, entry: str) -> None:
    """Add an entry on a line of its own, whatever the file ends with."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                entry = f"\n{entry}"
        file.write(f"{entry}\n".encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a key: print it to stdout, and its entry to the file or stderr."""
    parser = argparse.ArgumentParser(prog="python -m adapter.auth.keys")
    commands = parser.add_subparsers(required=True)
    new = commands.add_parser("new", help="make a key and print it; it is shown once")
    new.add_argument("name", help="name of the client; jobs belong to this name")
    new.add_argument("--file", type=Path, help="append the entry to this file")
    options = parser.parse_args(arguments)
    key = new_key()
    try:
        entry = entry_of(options.name, key)
    except ValueError as error:
        parser.error(str(error))
    if options.file is None:
        sys.stderr.write(f"for DLLM_API_KEYS, or a line of DLLM_API_KEYS_FILE:\n{entry}\n")
    else:
        append_entry(options.file, entry)
    sys.stdout.write(f"{key}\n")


if __name__ == "__main__":
    main()
