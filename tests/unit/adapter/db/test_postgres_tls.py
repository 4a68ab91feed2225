"""TLS to PostgreSQL, by libpq's parameters in DLLM_DATABASE_URL."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trustme
from pydantic import ValidationError
from sqlalchemy import literal, make_url, select

from adapter.db.database import Database, connect
from adapter.errors import StoreUnavailable
from adapter.settings import Settings
from tests.support.certificates import Chain, expired, files, write_cas

#: Tests that use a database use this one.
DATABASES = ("postgresql",)

#: What a client of PostgreSQL sends before it begins TLS: length 8, code 80877103.
SSL_REQUEST = bytes.fromhex("0000000804d2162f")


class TlsFront:
    """Speaks TLS, as PostgreSQL does, in front of a PostgreSQL without it."""

    def __init__(self, backend: str, chain: Chain, clients: trustme.CA | None) -> None:
        self._backend = make_url(backend)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        chain.configure_cert(self._tls)
        if clients is not None:
            clients.configure_trust(self._tls)
            self._tls.verify_mode = ssl.CERT_REQUIRED
        #: Names in the certificates that clients have shown, and None for those without.
        self.shown: list[str | None] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with suppress(OSError, asyncio.IncompleteReadError):
            assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST
            writer.write(b"S")
            await writer.start_tls(self._tls)
            shown = writer.get_extra_info("peercert")
            self.shown.append(shown["subjectAltName"][0][1] if shown else None)
            inside = await asyncio.open_connection(self._backend.host, self._backend.port)
            try:
                await asyncio.gather(_pump(reader, inside[1]), _pump(inside[0], writer))
            finally:
                inside[1].close()
        writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def tls_front(
    backend: str, chain: Chain, *, clients: trustme.CA | None = None
) -> AsyncIterator[tuple[TlsFront, str]]:
    """The front and its address, without parameters."""
    front = TlsFront(backend, chain, clients)
    server = await asyncio.start_server(front.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    address = make_url(backend).set(host="localhost", port=port)
    try:
        yield front, address.render_as_string(hide_password=False)
    finally:
        server.close()


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    """The authority of the server."""
    return trustme.CA()


async def test_jobs_lie_behind_tls(database_url: str, ca: trustme.CA, tmp_path: Path) -> None:
    """With verify-full every connection is checked, and shows the adapter's certificate."""
    roots = write_cas(tmp_path / "ca.pem", ca)
    own = files(tmp_path, "adapter", ca.issue_cert("adapter.example"))
    async with tls_front(database_url, ca.issue_cert("localhost"), clients=ca) as (front, address):
        url = f"{address}?sslmode=verify-full&sslrootcert={roots}"
        url = Settings(database_url=f"{url}&sslcert={own.cert}&sslkey={own.key}").database_url
        async with Database.open(url) as database:
            assert await database.read(select(literal(1))) == [(1,)]
            assert database.outage is None
        assert set(front.shown) == {"adapter.example"}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("another CA", "unable to get local issuer certificate"),
        ("another name", "Hostname mismatch"),
        ("expired", "certificate has expired"),
    ],
)
async def test_a_bad_certificate_is_the_reason_of_the_outage(
    fault: str, said: str, database_url: str, ca: trustme.CA, tmp_path: Path
) -> None:
    """Health shows what is wrong with the server's certificate."""
    roots = write_cas(tmp_path / "ca.pem", ca)
    chain = {
        "another CA": lambda: trustme.CA().issue_cert("localhost"),
        "another name": lambda: ca.issue_cert("db.example"),
        "expired": lambda: expired(ca, "localhost"),
    }[fault]()
    async with tls_front(database_url, chain) as (_, address):
        url = f"{address}?sslmode=verify-full&sslrootcert={roots}"
        async with Database.open(url, timeout=2) as database:
            assert said in str(database.outage)


async def test_new_connections_read_the_files_again(
    database_url: str, ca: trustme.CA, tmp_path: Path
) -> None:
    """Connections made after a change show the new certificate; the old ones go on."""
    roots = write_cas(tmp_path / "ca.pem", ca)
    own = files(tmp_path, "adapter", ca.issue_cert("old.example"))
    parameters = f"?sslmode=verify-full&sslrootcert={roots}&sslcert={own.cert}&sslkey={own.key}"
    async with (
        tls_front(database_url, ca.issue_cert("localhost"), clients=ca) as (front, address),
        connect(address + parameters) as backend,
    ):
        await backend.ping()
        own.write(ca.issue_cert("new.example"))
        await backend.ping()
        assert front.shown == ["old.example"]
        await backend.write(lambda connection: connection.execute(select(literal(1))).all())
        assert front.shown == ["old.example", "new.example"]


async def test_a_server_without_tls_is_not_used(database_url: str) -> None:
    """With sslmode=require, a server that speaks no TLS is an outage."""
    async with connect(f"{database_url}?sslmode=require", timeout=2) as backend:
        with pytest.raises(ConnectionError, match="rejected SSL upgrade"):
            await backend.ping()
    async with Database.open(f"{database_url}?sslmode=require", timeout=2) as database:
        with pytest.raises(StoreUnavailable, match="rejected SSL upgrade"):
            await database.read(select(literal(1)))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ("sslmode=verify", "sslmode should be one of disable, allow, prefer"),
        ("sslmode=verify-full", "should come with sslrootcert=FILE"),
        ("sslmode=verify-ca&sslrootcert=/nowhere", "sslrootcert should be a file: /nowhere"),
        ("passfile=/nowhere", "passfile should be a file: /nowhere"),
    ],
)
def test_a_wrong_parameter_is_named(parameters: str, said: str) -> None:
    """The start is refused with the parameter, and without the address, which has a password."""
    with pytest.raises(ValidationError) as refused:
        Settings(database_url=f"postgresql+asyncpg://me:hush@db/dllm?{parameters}")
    (error,) = refused.value.errors()
    assert said in error["msg"]
    assert "hush" not in error["msg"]
