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


def test_compose_passes_every_setting_on(project: Any) -> None:
    """Each setting of engine and adapter that is set where Compose runs reaches its service."""
    services = project["services"]
    engine = set(EngineConfig.settings()) | {"DLLM_EXIT_ON_ENGINE_DEATH"}
    # A path of the machine, for which compose.model.yaml mounts a folder.
    for name in engine - {"MODEL_PATH"}:
        assert services["triton"]["environment"].get(name, "lost") is None, name
    base = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["adapter"]
    for name in Settings.model_fields:
        variable = f"DLLM_{name.upper()}"
        if variable == "DLLM_TRITON_URL" or variable.endswith("_FILE"):  # Compose's own; paths
            continue
        value = base["environment"].get(variable, "lost")
        assert value is None or value.startswith(f"${{{variable}:-"), variable


def test_nothing_is_published_to_other_machines_by_default(project: Any) -> None:
    """Every port is one of 127.0.0.1 unless a variable says otherwise; Triton has none."""
    for name, service in project["services"].items():
        for port in service.get("ports", ()):
            assert re.match(r"\$\{\w+_HOST:-127\.0\.0\.1\}:", port), name
    assert "ports" not in project["services"]["triton"]
    # The adapter, which listens on all addresses of its container, is told which one is published.
    assert "DLLM_HOST" in project["services"]["adapter"]["environment"]


def test_grafana_needs_a_password_and_reaches_prometheus_only(project: Any) -> None:
    """No default password stands in front of a network with Triton's open API."""
    grafana = project["services"]["grafana"]
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?")
    reachable = [
        name
        for name, service in project["services"].items()
        if set(service.get("networks", ["default"])) & set(grafana["networks"])
    ]
    assert sorted(reachable) == ["grafana", "prometheus"]


def test_prometheus_loads_the_alerts(project: Any) -> None:
    """The file of alert rules is mounted where Prometheus's configuration names it."""
    config = yaml.safe_load(project["configs"]["prometheus"]["content"])
    (mount,) = project["services"]["prometheus"]["volumes"]
    source, target, _ = mount.split(":")
    assert (DEPLOY / source).is_file()
    assert [Path(target).name] == config["rule_files"]
    assert (
        Path(target).parent
        == Path(project["services"]["prometheus"]["configs"][0]["target"]).parent
    )


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_alerts_fire_when_they_should() -> None:
    """promtool plays an hour without faults, and one with every fault, against the rules."""
    run = subprocess.run(
        ["promtool", "test", "rules", Path(__file__).with_name("prometheus_alerts.yaml")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_is_tried() -> None:
    """Each rule has a case in which it fires, and one in which it does not."""
    rules = yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text())["groups"][0]["rules"]
    plays = yaml.safe_load(Path(__file__).with_name("prometheus_alerts.yaml").read_text())["tests"]
    quiet, loud = ({case["alertname"] for case in play["alert_rule_test"]} for play in plays)
    assert quiet == loud == {rule["alert"] for rule in rules}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
@pytest.mark.parametrize("part", READ)
def test_systemd_understands_the_units(part: str) -> None:
    """Nothing in a unit is unknown to systemd; only its command is not installed."""
    unit = DEPLOY / f"dllm-serve-{part}.service"
    run = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    problems = (run.stdout + run.stderr).splitlines()
    ours = [line for line in problems if unit.name in line or "dllm-serve" in line]
    assert [line for line in ours if "is not executable" not in line] == []


def test_the_triton_unit_sees_gpus_and_home() -> None:
    """No directive closes the GPUs' devices or hides checkpoints below /home."""
    lines = (DEPLOY / "dllm-serve-triton.service").read_text().splitlines()
    # ProtectClock allows one device, and with that no other.
    assert not {"PrivateDevices=yes", "ProtectClock=yes", "ProtectHome=yes"} & set(lines)
    assert "ExecStartPre=-+/usr/bin/nvidia-modprobe -u -c=0" in lines


@pytest.mark.parametrize("part", READ)
def test_units_may_open_many_connections(part: str) -> None:
    """systemd's default of 1024 open files is fewer than the streams and polls of one worker."""
    assert "LimitNOFILE=65536" in (DEPLOY / f"dllm-serve-{part}.service").read_text().splitlines()


def test_health_checks_pass_by_proxies() -> None:
    """A proxy in a container's environment is not asked for the container itself."""
    text = re.sub(r"\\\n *", "", (ROOT / "Dockerfile").read_text())
    triton, adapter = re.findall(r"^HEALTHCHECK .*$", text, re.MULTILINE)
    assert '"--noproxy", "*"' in triton
    assert "ProxyHandler({})" in adapter


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
    assert re.search(r"python +-m +adapter +[^#]*--timeout-graceful-shutdown +10", text)


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
    """nginx keeps an idle connection for 60 s; the side that closes first may cut a call short."""
    assert "keepalive_timeout" not in (DEPLOY / "nginx.conf").read_text()
    service = (DEPLOY / "dllm-serve-adapter.service").read_text()
    image = re.sub(r'[",\\\n]', " ", (ROOT / "Dockerfile").read_text())
    for command in (service, image):
        kept = re.search(
            r"python -m adapter.*--timeout-keep-alive +(\d+)", re.sub(" +", " ", command)
        )
        assert kept is not None
        assert int(kept.group(1)) > 60
    assert KEEP_ALIVE_SECONDS > 60
