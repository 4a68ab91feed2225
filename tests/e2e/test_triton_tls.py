"""Mutual TLS and a protocol key between the adapter, direct clients, and a real tritonserver."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
import trustme
from dllm_client import UnavailableError
from dllm_client.triton import Tls, TritonClient

from launcher.tritonserver import TritonServer
from tests.support.certificates import PemFiles, files, write_cas
from tests.support.servers import AdapterServer, eventually, triton_server

pytestmark = pytest.mark.slow

KEY = "infer-key=s3cret"
NEW_KEY = "infer-key2=t0psecret"


class Setup:
    """Files of both sides, and the server that uses them."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.ca = trustme.CA()
        self.roots = write_cas(folder / "ca.pem", self.ca)
        self.own = files(folder, "adapter", self.ca.issue_cert("adapter.example"))
        self.keys = folder / "keys"
        self.keys.write_text(f"{KEY}\n")

    def server(self, authority: trustme.CA, key: str, *, port: int = 0) -> TritonServer:
        """A tritonserver with a certificate of this authority, which asks for this key."""
        own = files(self.folder, "triton", authority.issue_cert("127.0.0.1"))
        server = triton_server(
            self.checkpoint,
            log_file=self.folder / "triton.log",
            extra_args=[
                "--grpc-use-ssl=true",
                "--grpc-use-ssl-mutual=true",
                f"--grpc-server-cert={own.cert}",
                f"--grpc-server-key={own.key}",
                f"--grpc-root-cert={self.roots}",
                f"--grpc-restricted-protocol=inference:{key}",
            ],
        )
        server.grpc_port = port or server.grpc_port
        return server

    @property
    def settings(self) -> dict[str, str]:
        """The adapter's settings."""
        return {
            "DLLM_TRITON_CA_FILE": str(self.roots),
            "DLLM_TRITON_CERT_FILE": str(self.own.cert),
            "DLLM_TRITON_KEY_FILE": str(self.own.key),
            "DLLM_TRITON_PROTOCOL_KEYS_FILE": str(self.keys),
            "DLLM_PROBE_INTERVAL": "1",
        }


@pytest.fixture
def setup(tmp_path: Path, checkpoint: Path) -> Setup:
    """The files."""
    return Setup(tmp_path, checkpoint)


def tls_of(roots: Path, own: PemFiles) -> Tls:
    """The same files for a direct client."""
    return Tls(str(roots), cert_file=str(own.cert), key_file=str(own.key))


def reason(adapter: AdapterServer) -> str:
    """Why the adapter is not healthy."""
    return str(requests.get(f"{adapter.url}/v1/health", timeout=30).json().get("reason"))


def test_certificates_and_keys_change_without_losing_jobs(setup: Setup) -> None:
    """Jobs finish over mutual TLS; with a new CA and a new key Triton comes back for the rest."""
    with setup.server(setup.ca, KEY) as triton:
        adapter = AdapterServer(triton, setup.folder / "jobs.db", settings=setup.settings)
        with adapter:
            assert adapter.finished(adapter.submit("hello", gen_length=16))

            with TritonClient(
                grpc_url=triton.grpc_url, tls=tls_of(setup.roots, setup.own), protocol_key=KEY
            ) as direct:
                assert direct.ready()
                once = direct.generate("hello", gen_length=12)
                *_, last = direct.stream("hello", gen_length=12)
                assert once.token_ids.tolist() == last.token_ids.tolist()
            with (
                TritonClient(
                    grpc_url=triton.grpc_url, tls=tls_of(setup.roots, setup.own)
                ) as keyless,
                pytest.raises(UnavailableError, match="protocol is restricted"),
            ):
                keyless.generate("hello", gen_length=12)

            setup.keys.write_text("infer-key=wrong\n")
            eventually(lambda: "Triton wants a key" in reason(adapter), "health tells of the key")
            setup.keys.write_text(f"{KEY}\n{NEW_KEY}\n")
            eventually(lambda: adapter.health() == 200, "both keys are sent")

            jobs = adapter.submit_batch(["a", "b", "c"] * 4, gen_length=128, ignore_eos=True)
            new_ca = trustme.CA()
            write_cas(setup.roots, setup.ca, new_ca)
            setup.own.write(new_ca.issue_cert("adapter.example"))
            triton.stop()
            assert "finished" not in adapter.statuses(jobs[-1:])
            with setup.server(new_ca, NEW_KEY, port=triton.grpc_port):
                for job in jobs:
                    assert adapter.finished(job)
                assert adapter.health() == 200
