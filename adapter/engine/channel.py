"""The gRPC channel to a tritonserver: TLS, its certificates, and Triton's protocol keys.

gRPC reads certificates once. So a channel is replaced when a file changes: new calls take the new
one, and the old one closes when its last stream ends.
"""

import asyncio
import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from adapter.errors import SettingsError
from adapter.settings import Settings
from adapter.telemetry.logs import get_logger

log = get_logger()

Options = Sequence[tuple[str, Any]]
Headers = tuple[tuple[str, str], ...]

#: Triton's header for a key; gRPC allows these characters in its name.
PROTOCOL_HEADER = "triton-grpc-protocol-"
PROTOCOL_KEY = re.compile(r"([0-9a-z_.-]+)=([\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?)")

OTHER_NAME = "its certificate is not for {name} (DLLM_TRITON_TLS_NAME)"
NO_TLS = "its gRPC port does not speak TLS, or something else listens there"
#: What gRPC says of a failed handshake, in small letters, and what it means.
TLS_FAILURES: Sequence[tuple[str, str]] = (
    ("certificate has expired", "its certificate has expired"),
    ("certificate is not yet valid", "its certificate is not valid yet"),
    (
        "hostname verification check failed",
        "its certificate is not for {name} (DLLM_TRITON_TLS_NAME)",
    ),
    ("certificate_verify_failed", "its certificate is from no CA in DLLM_TRITON_CA_FILE"),
    ("wrong_version_number", NO_TLS),
)
RESTRICTED = "protocol is restricted"
#: The server closes a connection in the handshake without a word.
REFUSED = "failed to connect to all addresses"
CLOSED = "socket closed"


@dataclass(frozen=True, slots=True)
class TritonCredentials:
    """How to reach Triton: files, which are read again when they change."""

    #: PEM certificates of the CAs that Triton's certificate may be from; None: no TLS.
    ca_file: Path | None = None
    #: PEM certificate chain and key of this adapter, for mutual TLS.
    cert_file: Path | None = None
    key_file: Path | None = None
    #: Name that Triton's certificate must have; empty: the host of the address.
    tls_name: str = ""
    #: Lines `KEY=VALUE`, as in Triton's option `--grpc-restricted-protocol`.
    protocol_keys_file: Path | None = None

    @classmethod
    def of(cls, settings: Settings) -> "TritonCredentials":
        """Make them from the settings."""
        return cls(
            settings.triton_ca_file,
            settings.triton_cert_file,
            settings.triton_key_file,
            settings.triton_tls_name,
            settings.triton_protocol_keys_file,
        )

    def signature(self) -> tuple[object, ...]:
        """Changes when a file does."""
        files = (self.ca_file, self.cert_file, self.key_file, self.protocol_keys_file)
        return tuple(_state(file) for file in files if file is not None)

    def check(self) -> None:
        """Raises `SettingsError` for files that cannot be used."""
        try:
            self.tls()
            self.headers()
        except OSError as error:
            msg = f"a file for the connection to Triton cannot be read: {error}"
            raise SettingsError(msg) from error

    def tls(self) -> grpc.ChannelCredentials | None:
        """What gRPC makes a channel with; None without TLS. Raises `SettingsError`, OSError."""
        if self.ca_file is None:
            return None
        ca, chain, key = map(_content, (self.ca_file, self.cert_file, self.key_file))
        # gRPC would only fail at the first call.
        try:
            ssl.create_default_context(cafile=self.ca_file)
        except (ssl.SSLError, ValueError) as error:
            msg = f"DLLM_TRITON_CA_FILE: no certificates in {self.ca_file} ({error})"
            raise SettingsError(msg) from error
        if self.cert_file is not None:
            try:
                ssl.create_default_context().load_cert_chain(self.cert_file, self.key_file)
            except (ssl.SSLError, ValueError) as error:
                msg = (
                    f"DLLM_TRITON_CERT_FILE, DLLM_TRITON_KEY_FILE: no certificate in "
                    f"{self.cert_file} with its key in {self.key_file} ({error})"
                )
                raise SettingsError(msg) from error
        return grpc.ssl_channel_credentials(ca, key, chain)

    def headers(self) -> Headers:
        """Triton's headers for the protocol keys. Raises `SettingsError`, OSError."""
        if self.protocol_keys_file is None:
            return ()
        lines = (_content(self.protocol_keys_file) or b"").decode(errors="replace").splitlines()
        found = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            entry = PROTOCOL_KEY.fullmatch(line.strip())
            if entry is None:  # not shown: it may be a secret
                msg = (
                    f"DLLM_TRITON_PROTOCOL_KEYS_FILE: line {number} of {self.protocol_keys_file} "
                    "must be KEY=VALUE, KEY in small letters, digits and ._-"
                )
                raise SettingsError(msg)
            found.append((PROTOCOL_HEADER + entry[1], entry[2]))
        return tuple(found)


@dataclass(slots=True, eq=False)
class _Connection:
    """A channel made with one state of the files."""

    channel: grpc.aio.Channel
    stub: Any
    headers: Headers
    users: int = 0


class TritonChannel:
    """The channel of today's files; make it inside a running event loop.

    Files that cannot be used raise an error at first (`TritonCredentials.check`). Later they leave
    the channel as it is and are logged: certificate and key are replaced one after the other.
    """

    def __init__(self, url: str, options: Options, credentials: TritonCredentials) -> None:
        self._url = url
        self._options = list(options)
        if credentials.tls_name:
            self._options.append(("grpc.ssl_target_name_override", credentials.tls_name))
        self._credentials = credentials
        self._closing: set[asyncio.Task[None]] = set()
        self._signature = credentials.signature()
        self._current = self._connect()

    @contextmanager
    def use(self) -> Iterator[tuple[Any, Headers]]:
        """The stub to call, and the headers to send; the channel stays open within the context."""
        self._renew()
        connection = self._current
        connection.users += 1
        try:
            yield connection.stub, connection.headers
        finally:
            connection.users -= 1
            self._close_if_replaced(connection)

    async def close(self) -> None:
        """Close the channel, and with it every stream."""
        await self._current.channel.close()
        if self._closing:
            await asyncio.wait(self._closing)

    def explain(self, text: str) -> str | None:
        """Return why Triton refused the connection of a failed call; None if it did not."""
        lowered = text.lower()
        if RESTRICTED in lowered:
            return f"Triton wants a key, see DLLM_TRITON_PROTOCOL_KEYS_FILE ({text})"
        reason = next((why for words, why in TLS_FAILURES if words in lowered), None)
        if reason is None and REFUSED in lowered and CLOSED in lowered:
            reason = self._why_closed()
        if reason is None:
            return None
        name = self._credentials.tls_name or self._url.rpartition(":")[0]
        return f"no connection to Triton: {reason.format(name=name)} ({text})"

    def _why_closed(self) -> str:
        if self._credentials.ca_file is None:
            return "it closes connections at once; if it wants TLS, set DLLM_TRITON_CA_FILE"
        if self._credentials.cert_file is None:
            return "it may want a certificate of the adapter: set DLLM_TRITON_CERT_FILE"
        return "it may not accept the certificate in DLLM_TRITON_CERT_FILE, which may have expired"

    def _connect(self) -> _Connection:
        tls, headers = self._credentials.tls(), self._credentials.headers()
        if tls is None:
            channel = grpc.aio.insecure_channel(self._url, options=self._options)
        else:
            channel = grpc.aio.secure_channel(self._url, tls, options=self._options)
        return _Connection(channel, service_pb2_grpc.GRPCInferenceServiceStub(channel), headers)

    def _renew(self) -> None:
        signature = self._credentials.signature()
        if signature == self._signature:
            return
        self._signature = signature
        try:
            replaced, self._current = self._current, self._connect()
        except (OSError, SettingsError) as error:
            log.error("triton_credentials_not_read", engine=self._url, error=str(error))
            return
        log.info("triton_credentials_read", engine=self._url)
        self._close_if_replaced(replaced)

    def _close_if_replaced(self, connection: _Connection) -> None:
        if connection is not self._current and not connection.users:
            task = asyncio.create_task(connection.channel.close(), name="triton-channel-close")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _content(file: Path | None) -> bytes | None:
    return None if file is None else file.read_bytes()
