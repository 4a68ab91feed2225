"""TLS between clients and the adapter: by uvicorn, or by nginx in front of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography import x509

from launcher.ports import free_port
from launcher.process import GuardedProcess
from tests.support.certificates import files, write_cas
from tests.support.servers import eventually

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


def serial_at(port: int) -> int:
    """The serial number of the certificate that a server shows."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain) as tls,
    ):
        shown = tls.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def is_up(url: str, roots: Path) -> Callable[[], bool]:
    """Whether the adapter answers there."""

    def asks() -> bool:
        try:
            with httpx.Client(verify=ssl.create_default_context(cafile=roots)) as client:
                return client.get(f"{url}/v1/livez", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    return asks


def adapter_process(folder: Path, *options: str) -> GuardedProcess:
    """`python -m adapter` on a database of its own, without a tritonserver."""
    command = [sys.executable, "-m", "adapter", "--timeout-graceful-shutdown", "2", *options]
    return GuardedProcess(
        command,
        name="adapter",
        env={**os.environ, "DLLM_DATABASE_URL": f"sqlite:///{folder}/jobs.db"},
        log_file=folder / "log",
    )


def test_uvicorn_serves_tls_and_changes_its_certificate(tmp_path: Path) -> None:
    """After SIGHUP new workers show the new certificate; no call fails meanwhile."""
    ca, port = trustme.CA(), free_port()
    roots = write_cas(tmp_path / "ca.pem", ca)
    own = files(tmp_path, "adapter", ca.issue_cert("localhost"))
    tls = ["--ssl-certfile", str(own.cert), "--ssl-keyfile", str(own.key)]
    # A new worker has to be ready within this time, or the old one stays.
    patience = ["--timeout-worker-healthcheck", "60"]
    adapter = adapter_process(tmp_path, "--port", str(port), "--workers", "2", *tls, *patience)
    url = f"https://localhost:{port}"
    over = threading.Event()
    try:
        answers = is_up(url, roots)
        eventually(answers, "the adapter answers")
        failed: list[str] = []

        def ask() -> None:
            while not over.wait(0.05):
                if not answers():
                    failed.append("a call")

        asking = threading.Thread(target=ask)
        asking.start()
        old = serial_at(port)
        own.write(ca.issue_cert("localhost"))
        os.kill(adapter.pid, signal.SIGHUP)
        eventually(
            lambda: all(serial_at(port) != old for _ in range(8)), "all workers have the new one"
        )
        over.set()
        asking.join()
        assert failed == []

        # What the command and every other client of httpx read.
        dllm = [Path(sys.executable).with_name("dllm"), "--url", url, "jobs", "submit", "hello"]
        for trusted, code in ((roots, 0), (write_cas(tmp_path / "other.pem", trustme.CA()), 1)):
            run = subprocess.run(
                dllm, env={**os.environ, "SSL_CERT_FILE": str(trusted)}, capture_output=True
            )
            assert run.returncode == code, run.stderr
            assert code == 0 or b"unable to get local issuer certificate" in run.stderr
    finally:
        over.set()
        adapter.stop()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="there is no nginx here")
def test_nginx_serves_tls(tmp_path: Path) -> None:
    """The block of docs/tls.md, in deploy/nginx.conf, answers for the adapter behind it."""
    page = (ROOT / "docs/tls.md").read_text()
    block = re.search(r"```nginx\n(.*?)```", page, re.DOTALL)
    assert block is not None
    ca, inside, outside = trustme.CA(), free_port(), free_port()
    roots = write_cas(tmp_path / "ca.pem", ca)
    own = files(tmp_path, "adapter", ca.issue_cert("localhost"))
    lines = re.sub(r"listen 443", f"listen 127.0.0.1:{outside}", block[1])
    lines = lines.replace("/etc/dllm-serve/tls/adapter.pem", str(own.cert))
    lines = lines.replace("/etc/dllm-serve/tls/adapter.key", str(own.key))
    conf = (ROOT / "deploy/nginx.conf").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{inside}")
    conf = re.sub(r"    listen 80;\n", lines, conf)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}/body;\n{conf}}}\n"
    )
    adapter = adapter_process(tmp_path, "--port", str(inside))
    nginx = subprocess.Popen(["nginx", "-c", tmp_path / "nginx.conf", "-p", tmp_path])
    try:
        eventually(is_up(f"https://localhost:{outside}", roots), "the adapter answers by nginx")
        old = serial_at(outside)
        own.write(ca.issue_cert("localhost"))
        nginx.send_signal(signal.SIGHUP)
        eventually(lambda: serial_at(outside) != old, "a reload shows the new certificate")
    finally:
        nginx.terminate()
        nginx.wait()
        adapter.stop()
