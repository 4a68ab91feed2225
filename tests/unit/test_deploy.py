"""What `deploy/` sets is what the code reads; no engine of Docker is needed to see that."""

import re
import shutil
import subprocess
import sys
import tomllib
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from dllm_engine import EngineConfig

from adapter.settings import Settings
from launcher.adapter import KEEP_ALIVE_SECONDS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
ADAPTER = {f"DLLM_{name.upper()}" for name in Settings.model_fields}
ADAPTER |= {"WEB_CONCURRENCY", "PROMETHEUS_MULTIPROC_DIR"}
ENGINE = {*EngineConfig.settings(), "MODEL_PATH", "TRITON_CACHE_DIR", "HOME"}
ENGINE |= {"DLLM_EXIT_ON_ENGINE_DEATH"}
READ = {"adapter": ADAPTER, "triton": ENGINE}
COMPOSE = sorted(DEPLOY.glob("compose*.yaml"))


def merged(left: Any, right: Any) -> Any:
    """As compose merges several files: mappings by their keys, all else by the later one."""
    if isinstance(left, dict) and isinstance(right, dict):
        common = {key: merged(left[key], right[key]) for key in left.keys() & right.keys()}
        return {**left, **right, **common}
    return right


@pytest.fixture(scope="module")
def project() -> Any:
    """All files of compose together."""
    base = sorted(COMPOSE, key=lambda path: path.name != "compose.yaml")
    return reduce(merged, (yaml.safe_load(path.read_text()) for path in base))


def test_compose_sets_what_is_read(project: Any) -> None:
    """Every variable that a service of ours is given is a setting of it, or of its image."""
    for service, known in READ.items():
        assert set(project["services"][service].get("environment", ())) <= known, service


def test_compose_names_what_there_is(project: Any) -> None:
    """Volumes, configurations, other services, stages and files that are named exist."""
    stages = re.findall(r"^FROM .* AS ([\w-]+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name, service in project["services"].items():
        assert set(service.get("depends_on", ())) <= set(project["services"]), name
        assert {one["source"] for one in service.get("configs", ())} <= set(project["configs"])
        if build := service.get("build"):
            assert build["target"] in stages
            assert (DEPLOY / build["context"]).resolve() == ROOT
        for source in (volume.split(":")[0] for volume in service.get("volumes", ())):
            if source.startswith("./"):
                assert (DEPLOY / source).exists()
            elif not source.startswith("$"):
                assert source in project["volumes"], source


def test_prometheus_asks_where_somebody_listens(project: Any) -> None:
    """Each target is a service of ours at a port that it opens."""
    config = yaml.safe_load(project["configs"]["prometheus"]["content"])
    ports = {"adapter": {"8000"}, "triton": set(project["services"]["triton"]["expose"])}
    for job in config["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            host, _, port = target.partition(":")
            assert port in ports[host], target


@pytest.mark.parametrize("part", READ)
def test_units_set_what_is_read(part: str) -> None:
    """A unit of systemd sets settings only, and leaves more time for a stop than a stop takes."""
    text = (DEPLOY / f"dllm-serve-{part}.service").read_text()
    lines = re.findall(r"^Environment=(.*)$", text, re.MULTILINE)
    assert lines
    for assignment in " ".join(lines).split():
        name, _, value = assignment.partition("=")
        assert name in READ[part], name
        assert value, name
    patience = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert patience is not None
    assert int(patience[1]) > Settings.model_fields["drain_seconds"].default + 10


@pytest.mark.parametrize(
    ("part", "names"),
    [("engine", ["engine", "quantization"]), ("adapter", ["adapter", "otel", "client"])],
)
def test_an_image_has_what_settings_ask_for(part: str, names: list[str], tmp_path: Path) -> None:
    """No setting, such as DLLM_TRACING, needs a package that the image lacks."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run([sys.executable, DEPLOY / "requirements.py"], cwd=tmp_path, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [line for name in names for line in project["optional-dependencies"][name]]
    assert (tmp_path / f"{part}.txt").read_text().splitlines() == wanted


@pytest.mark.parametrize("file", ["Dockerfile", "deploy/dllm-serve-adapter.service"])
def test_a_stop_does_not_wait_for_streams(file: str) -> None:
    """uvicorn is told when to break off what still runs, or else it waits for the last stream."""
    text = re.sub(r"[\",\\\n]+ *", " ", (ROOT / file).read_text())
    assert re.search(r"uvicorn +adapter\.app:app [^#]*--timeout-graceful-shutdown +10", text)


def test_a_loading_engine_does_not_make_the_adapter_unhealthy() -> None:
    """Swarm and the like kill what is unhealthy, which helps no engine: /v1/livez is asked."""
    _, adapter = (ROOT / "Dockerfile").read_text().split(" AS adapter\n")
    check = re.search(r"^HEALTHCHECK .*\\\n *CMD (.*)$", adapter, re.MULTILINE)
    assert check is not None
    assert "localhost:8000/v1/livez" in check[1]


def test_nginx_lets_through_what_the_adapter_reads() -> None:
    """No body and no held poll is cut by the proxy that the adapter would accept."""
    text = (DEPLOY / "nginx.conf").read_text()
    size = re.search(r"client_max_body_size (\d+)m;", text)
    patience = re.search(r"proxy_read_timeout (\d+)s;", text)
    assert size is not None
    assert int(size[1]) * 2**20 >= Settings.model_fields["max_body_bytes"].default
    assert patience is not None
    assert int(patience[1]) > 60
    assert "proxy_buffering off;" in text


def test_adapter_keeps_connections_for_longer_than_nginx() -> None:
    """nginx keeps an idle one for 60 s; whoever closes first may cut a call short."""
    assert "keepalive_timeout" not in (DEPLOY / "nginx.conf").read_text()
    service = (DEPLOY / "dllm-serve-adapter.service").read_text()
    image = re.sub(r'[",\\\n]', " ", (ROOT / "Dockerfile").read_text())
    for command in (service, image):
        kept = re.search(
            r"uvicorn adapter.*--timeout-keep-alive +(\d+)", re.sub(" +", " ", command)
        )
        assert kept is not None
        assert int(kept.group(1)) > 60
    assert KEEP_ALIVE_SECONDS > 60
