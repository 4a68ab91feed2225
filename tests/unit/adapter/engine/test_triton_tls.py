"""TLS to Triton, its protocol keys, and files that change while the adapter runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from adapter_fakes import fast_settings, until
from tritonclient.grpc import service_pb2, service_pb2_grpc

from adapter.app import create_app
from adapter.engine.channel import TritonCredentials
from adapter.engine.triton import TritonEngine
from adapter.errors import SettingsError, Unavailable
from tests.support.certificates import Chain, expired, files, write_cas

HOST = "127.0.0.1"


@dataclass
class Asked(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers every request, and notes the certificates and keys that its callers show."""

    names: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    #: Requests that generate are answered once this is set.
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def ModelStreamInfer(  # noqa: N802  the protocol's name
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """One response per request."""
        self.names = [
            name.decode()
            for name in context.auth_context().get("x509_subject_alternative_name", ())
        ]
        self.keys = {
            name.removeprefix("triton-grpc-protocol-"): value
            for name, value in context.invocation_metadata()
            if name.startswith("triton-grpc-protocol-")
        }
        async for request in requests:
            if request.inputs[0].name != "cancel":
                await self.released.wait()
            response = service_pb2.ModelInferResponse(model_name="dllm", id=request.id)
            for name in ("text_output", "finish_reason"):
                response.outputs.add(name=name, datatype="BYTES", shape=[1, 1])
                response.raw_output_contents.append((2).to_bytes(4, "little") + b"ok")
            yield service_pb2.ModelStreamInferResponse(infer_response=response)


@asynccontextmanager
async def served(
    triton: Asked, chain: Chain | None, *, clients: trustme.CA | None = None, port: int = 0
) -> AsyncIterator[str]:
    """Serve it with this certificate, or without TLS; the address. `clients`: mutual TLS."""
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    if chain is None:
        port = server.add_insecure_port(f"{HOST}:{port}")
    else:
        pair = (chain.private_key_pem.bytes(), chain.cert_chain_pems[0].bytes())
        roots = None if clients is None else clients.cert_pem.bytes()
        credentials = grpc.ssl_server_credentials([pair], roots, clients is not None)
        port = server.add_secure_port(f"{HOST}:{port}", credentials)
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def connected(url: str, **credentials: Any) -> AsyncIterator[TritonEngine]:
    """The adapter's side of it."""
    engine = TritonEngine(
        url,
        "dllm",
        stream_interval=0.5,
        idle_timeout=20,
        credentials=TritonCredentials(**credentials),
    )
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    """The authority that everybody here trusts."""
    return trustme.CA()


@pytest.fixture(scope="module")
def other() -> trustme.CA:
    """One that nobody trusts."""
    return trustme.CA()


async def test_both_sides_show_certificates(ca: trustme.CA, tmp_path: Path) -> None:
    """With a certificate of its own the adapter passes mutual TLS; the name can be another."""
    own = files(tmp_path, "adapter", ca.issue_cert("adapter.example"))
    roots = write_cas(tmp_path / "ca.pem", ca)
    triton = Asked()
    async with (
        served(triton, ca.issue_cert("triton.example"), clients=ca) as url,
        connected(
            url, ca_file=roots, cert_file=own.cert, key_file=own.key, tls_name="triton.example"
        ) as engine,
    ):
        await engine.probe()
    assert triton.names == ["adapter.example"]


@dataclass(frozen=True)
class Case:
    """A handshake that fails."""

    reason: str
    #: Triton's certificate: who issued it, for which name, and whether it has expired; "": no TLS.
    issuer: str = "ca"
    name: str = HOST
    is_expired: bool = False
    #: Triton wants a certificate of the adapter.
    mutual: bool = False
    #: The adapter uses TLS, with a certificate from this issuer.
    tls: bool = True
    own: str = ""


CASES = {
    "another CA": Case("its certificate is from no CA in DLLM_TRITON_CA_FILE", issuer="other"),
    "another name": Case(
        f"its certificate is not for {HOST} (DLLM_TRITON_TLS_NAME)", name="triton.example"
    ),
    "expired": Case("its certificate has expired", is_expired=True),
    "no TLS there": Case("its gRPC port does not speak TLS", issuer=""),
    "no TLS here": Case("if it wants TLS, set DLLM_TRITON_CA_FILE", tls=False),
    "it wants a certificate": Case(
        "it may want a certificate of the adapter: set DLLM_TRITON_CERT_FILE", mutual=True
    ),
    "it wants another certificate": Case(
        "it may not accept the certificate in DLLM_TRITON_CERT_FILE", mutual=True, own="other"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_a_refused_handshake_says_what_to_change(
    case: Case, ca: trustme.CA, other: trustme.CA, tmp_path: Path
) -> None:
    """The reason, which health shows, names the certificate's fault and the setting."""
    issuers = {"ca": ca, "other": other}
    credentials: dict[str, Path] = {}
    if case.tls:
        credentials["ca_file"] = write_cas(tmp_path / "ca.pem", ca)
    if case.own:
        own = files(tmp_path, "own", issuers[case.own].issue_cert("adapter.example"))
        credentials |= {"cert_file": own.cert, "key_file": own.key}
    issuer = issuers.get(case.issuer)
    issue = expired if case.is_expired else trustme.CA.issue_cert
    chain = None if issuer is None else issue(issuer, case.name)
    async with (
        served(Asked(), chain, clients=ca if case.mutual else None) as url,
        connected(url, **credentials) as engine,
    ):
        with pytest.raises(Unavailable) as refused:
            await engine.probe()
    assert str(refused.value).startswith("no connection to Triton: ")
    assert case.reason in str(refused.value)


async def test_a_new_certificate_is_taken_while_streams_go_on(
    ca: trustme.CA, tmp_path: Path
) -> None:
    """Calls after a change show the new certificate; an open stream goes on to its end."""
    own = files(tmp_path, "adapter", ca.issue_cert("old.example"))
    roots = write_cas(tmp_path / "ca.pem", ca)
    triton = Asked()
    async with (
        served(triton, ca.issue_cert(HOST), clients=ca) as url,
        connected(url, ca_file=roots, cert_file=own.cert, key_file=own.key) as engine,
    ):
        stream = engine.generate({"text_input": "hello"}, request_id="a-1")
        answer = asyncio.ensure_future(anext(stream))
        await until(lambda: triton.names == ["old.example"])
        own.write(ca.issue_cert("new.example"))
        await engine.probe()
        assert triton.names == ["new.example"]
        triton.released.set()
        assert (await answer).finish_reason == "ok"
        await stream.aclose()


async def test_triton_may_change_its_authority(
    ca: trustme.CA, other: trustme.CA, tmp_path: Path
) -> None:
    """With both CAs in the file, Triton comes back with a certificate of the other."""
    roots = write_cas(tmp_path / "ca.pem", ca)
    async with served(Asked(), ca.issue_cert(HOST)) as url:
        port = int(url.rpartition(":")[2])
        engine_of = connected(url, ca_file=roots)
        engine = await engine_of.__aenter__()
        await engine.probe()
    write_cas(roots, ca, other)
    async with served(Asked(), other.issue_cert(HOST), port=port):
        await engine.probe()
        await engine_of.__aexit__(None, None, None)


async def test_files_that_do_not_fit_leave_the_connection(ca: trustme.CA, tmp_path: Path) -> None:
    """A certificate whose key has not been written yet waits for it."""
    own = files(tmp_path, "adapter", ca.issue_cert("old.example"))
    roots = write_cas(tmp_path / "ca.pem", ca)
    triton = Asked()
    async with (
        served(triton, ca.issue_cert(HOST), clients=ca) as url,
        connected(url, ca_file=roots, cert_file=own.cert, key_file=own.key) as engine,
    ):
        new = ca.issue_cert("new.example")
        own.cert.write_bytes(new.cert_chain_pems[0].bytes())
        await engine.probe()
        assert triton.names == ["old.example"]
        own.key.write_bytes(new.private_key_pem.bytes())
        await engine.probe()
        assert triton.names == ["new.example"]


async def test_protocol_keys_are_sent_and_read_again(tmp_path: Path) -> None:
    """Each line of the file is a header of every call, so an old and a new key overlap."""
    keys = tmp_path / "keys"
    keys.write_text("infer-key=s3cret, with = and space\n")
    triton = Asked()
    async with served(triton, None) as url, connected(url, protocol_keys_file=keys) as engine:
        await engine.probe()
        assert triton.keys == {"infer-key": "s3cret, with = and space"}
        keys.write_text("infer-key=old\n\ninfer-key2=new\n")
        await engine.probe()
        assert triton.keys == {"infer-key": "old", "infer-key2": "new"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("triton_ca_file", "", "DLLM_TRITON_CA_FILE: no certificates in "),
        ("triton_protocol_keys_file", "Key=hush\n", "must be KEY=VALUE"),
        ("triton_ca_file", None, "cannot be read: [Errno 2]"),
    ],
)
def test_bad_files_refuse_the_start(
    name: str, content: str | None, said: str, tmp_path: Path
) -> None:
    """A file that holds nothing usable is named at the start, without its content."""
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError) as refused:
        create_app(fast_settings(f"sqlite:///{tmp_path}/jobs.db", **{name: file}))
    assert said in str(refused.value)
    assert "hush" not in str(refused.value)
