"""What the Helm chart renders runs: its commands, environment and probes, as local processes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import requests
import trustme

from adapter.auth.keys import entry_of
from launcher.installation import find_installation, make_scratch
from launcher.ports import free_port
from launcher.process import GuardedProcess
from tests.support.certificates import files, write_cas
from tests.support.charts import FULL, LocalPod, one, render
from tests.support.servers import REPOSITORY, eventually

pytestmark = pytest.mark.slow


def test_the_full_release_serves_a_job(tmp_path: Path, checkpoint: Path) -> None:
    """Migration, Triton with mutual TLS and a key, and the adapter run as rendered, and stop."""
    options = {"extraArgs": ["--log-verbose=0"]}
    settings = {"DLLM_DEVICE": "cpu"}
    objects = render({**FULL, "settings": settings, "triton": {**FULL["triton"], **options}})
    ports = {"api": free_port(), "http": free_port(), "grpc": free_port(), "metrics": free_port()}
    ca = trustme.CA()
    own = files(tmp_path, "own", ca.issue_cert("triton.example.org"))
    tls = {"tls.crt": own.cert.read_text(), "tls.key": own.key.read_text()}
    tls["ca.crt"] = write_cas(tmp_path / "ca.pem", ca).read_text()
    key = "dllm-test-key"
    secrets = {
        "db": {"url": f"sqlite:///{tmp_path}/jobs.db"},
        "db-tls": {},
        "api-keys": {"keys": entry_of("team", key)},
        "triton-tls": tls,
        "triton-key": {"key": "infer-key=s3cret"},
        "hub": {"token": "x"},
    }

    def local(kind: str, replace: dict[str, str]) -> LocalPod:
        pod = one(objects, kind)["spec"]["template"]["spec"]
        return LocalPod(pod, tmp_path / kind, secrets=secrets, replace=replace)

    migration = local("Job", {})
    run = subprocess.run(migration.command, env=migration.env, capture_output=True, text=True)
    assert (run.returncode, run.stdout[:15]) == (0, "schema none -> "), run.stderr

    installation, scratch = find_installation(), make_scratch()
    image = {
        "/opt/dllm-serve/model_repository": str(REPOSITORY),
        "/models/checkpoint": str(checkpoint),
    }
    triton = local("StatefulSet", image)
    here = [f"--{name}-port={ports[name]}" for name in ("http", "grpc", "metrics")]
    here += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    here += [f"--backend-directory={installation.make_backend_directory(scratch)}"]
    command = [str(installation.binary), *triton.command[1:], *here]
    server = GuardedProcess(
        command,
        name="tritonserver",
        env=installation.environment(triton.env, scratch),
        grace=60,
        scratch=scratch,
        log_file=tmp_path / "triton.log",
    )
    adapter = None
    try:
        url = f"http://127.0.0.1:{ports['http']}"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = triton.path_of(probe)
            eventually(lambda: _answers(url + path), f"{probe} of Triton")  # noqa: B023

        service = {":8001": f":{ports['grpc']}", "--port 8000": f"--port {ports['api']}"}
        service[f"{one(objects, 'StatefulSet')['metadata']['name']}.serving.svc"] = "127.0.0.1"
        rest = local("Deployment", service)
        adapter = GuardedProcess(
            rest.command, name="adapter", env=rest.env, grace=40, log_file=tmp_path / "adapter.log"
        )
        url = f"http://127.0.0.1:{ports['api']}"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = rest.path_of(probe)
            eventually(lambda: _answers(url + path), f"{probe} of the adapter")  # noqa: B023
        eventually(lambda: _answers(f"{url}/v1/health"), "it reaches Triton over mutual TLS")
        body = {"prompt": "hello", "gen_length": 16}
        assert requests.post(f"{url}/v1/generate", json=body, timeout=30).status_code == 401
        headers = {"X-API-Key": key}
        answer = requests.post(f"{url}/v1/generate", json=body, headers=headers, timeout=30).json()
        result = f"{url}/v1/result/{answer['request_ids'][0]}?wait=60"
        assert requests.get(result, headers=headers, timeout=90).json()["status"] == "finished"
        assert "dllm_adapter_jobs_done_total" in requests.get(f"{url}/metrics", timeout=30).text
    finally:
        if adapter is not None:
            adapter.stop()
        server.stop()


def _answers(url: str) -> bool:
    try:
        return bool(requests.get(url, timeout=30).status_code == 200)
    except requests.ConnectionError:
        return False
