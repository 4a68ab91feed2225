"""The Helm chart: what it renders is valid, safe, and what the code reads. No cluster is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from dllm_engine import EngineConfig

from adapter.settings import Settings
from tests.support.charts import CHART, CLAIM, FULL, MINIMAL, containers, one, pods, render

DEPLOY = CHART.parents[1]
KUBERNETES = "1.37"
#: Kinds of the Prometheus operator and of KEDA, which Kubernetes' own schemas do not have.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
RELEASES = {"minimal": MINIMAL, "full": FULL, "claim": CLAIM}
READ = {f"DLLM_{name.upper()}" for name in Settings.model_fields}
READ |= {*EngineConfig.settings(), "DLLM_EXIT_ON_ENGINE_DEATH"}
READ |= {"WEB_CONCURRENCY", "PROMETHEUS_MULTIPROC_DIR", "HOME", "HF_TOKEN", "TRITON_PROTOCOL_KEY"}


@pytest.fixture(scope="module")
def releases() -> dict[str, list[dict[str, Any]]]:
    """The objects of each release."""
    return {name: render(values) for name, values in RELEASES.items()}


@pytest.fixture(params=RELEASES)
def objects(request: pytest.FixtureRequest, releases: Any) -> list[dict[str, Any]]:
    """The objects of one release."""
    return list(releases[request.param])


def test_lint_finds_nothing_but_the_missing_icon() -> None:
    """`helm lint` has no warning."""
    found = helm_python.lint(CHART, MINIMAL)
    assert found["errors"] == []
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]


def test_objects_have_the_schema_of_kubernetes(objects: list[dict[str, Any]]) -> None:
    """No field is unknown or of a wrong type."""
    for found in objects:
        if found["kind"] not in CUSTOM:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)


def test_every_kind_is_rendered(releases: Any) -> None:
    """The full release has all kinds of objects, the minimal one asks for no operator."""
    full = {found["kind"] for found in releases["full"]}
    assert full >= CUSTOM | {"Ingress", "HorizontalPodAutoscaler", "NetworkPolicy", "Job"}
    assert not CUSTOM & {found["kind"] for found in releases["minimal"]}


def test_pods_are_confined(objects: list[dict[str, Any]]) -> None:
    """No container runs as root, writes to its image, gains privileges, or reaches the API."""
    for pod in pods(objects):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.get("hostNetwork")
        assert not any("hostPath" in volume for volume in pod.get("volumes", ()))
    for container in containers(objects):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_containers_are_bounded_and_pinned(objects: list[dict[str, Any]]) -> None:
    """Each has requests, a limit of memory, and an image with a version."""
    for container in containers(objects):
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        assert re.fullmatch(r"[^:]+:[\w.-]+", container["image"])
        assert not container["image"].endswith(":latest")


def test_servers_have_probes_and_stop_in_order(objects: list[dict[str, Any]]) -> None:
    """Each server is probed, and its grace covers the pause before the stop and the stop itself."""
    defaults = {name: Settings.model_fields[name].default for name in ("drain_seconds",)}
    stop = {"adapter": defaults["drain_seconds"] + 10, "triton": 30}
    for kind, part in (("Deployment", "adapter"), ("StatefulSet", "triton")):
        pod = one(objects, kind)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] in {p["name"] for p in container["ports"]}
        pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] >= pause + stop[part] + 5


def test_loading_a_large_model_is_waited_for(objects: list[dict[str, Any]]) -> None:
    """Triton may load for half an hour before Kubernetes kills it."""
    (triton,) = one(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    probe = triton["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1800


def test_an_update_takes_no_adapter_away_before_the_next_serves(
    objects: list[dict[str, Any]],
) -> None:
    """The new pod is ready first; a drained node takes one pod of each part at a time."""
    strategy = one(objects, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}
    for part in ("adapter", "triton"):
        assert one(objects, "PodDisruptionBudget", part)["spec"]["maxUnavailable"] == 1


def test_the_schema_is_migrated_before_new_pods(objects: list[dict[str, Any]]) -> None:
    """A hook does so, with the adapter's image and database."""
    job = one(objects, "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    (migration,) = job["spec"]["template"]["spec"]["containers"]
    (adapter,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert migration["command"] == ["python", "-m", "adapter.migrate"]
    assert migration["image"] == adapter["image"]
    assert migration["env"][0] in adapter["env"]


def test_selectors_select(objects: list[dict[str, Any]]) -> None:
    """Services, budgets, policies and monitors select the pods of their part; targets exist."""
    kinds = {"adapter": "Deployment", "triton": "StatefulSet"}
    labels = {
        part: one(objects, kind)["spec"]["template"]["metadata"]["labels"]
        for part, kind in kinds.items()
    }

    def selects(selector: dict[str, str], part: str) -> bool:
        return selector.items() <= labels[part].items()

    for part, kind in kinds.items():
        other = "triton" if part == "adapter" else "adapter"
        service = one(objects, "Service", part)
        for selector in (
            service["spec"]["selector"],
            one(objects, "PodDisruptionBudget", part)["spec"]["selector"]["matchLabels"],
            one(objects, kind)["spec"]["selector"]["matchLabels"],
        ):
            assert selects(selector, part)
            assert not selects(selector, other)
        ports = one(objects, kind)["spec"]["template"]["spec"]["containers"][0]["ports"]
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= {p["name"] for p in ports}
    targets = [
        found["spec"]["scaleTargetRef"]
        for found in objects
        if found["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
    ]
    for target in targets:
        one(objects, target["kind"], target["name"])
        # Their number is the scaler's.
        assert "replicas" not in one(objects, target["kind"])["spec"]
    for monitor in (found for found in objects if found["kind"] == "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = (
            found
            for found in objects
            if found["kind"] == "Service" and wanted <= found["metadata"]["labels"].items()
        )
        assert monitor["spec"]["endpoints"][0]["port"] in {
            p["name"] for p in service["spec"]["ports"]
        }
        assert monitor["spec"]["jobLabel"] in service["metadata"]["labels"]


def test_only_adapters_reach_triton(objects: list[dict[str, Any]]) -> None:
    """Its gRPC port is open to adapters, its metrics to the monitoring, and nothing else is."""
    policy = one(objects, "NetworkPolicy")["spec"]
    calls, metrics = policy["ingress"]
    (adapter,) = calls["from"]
    assert adapter["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "adapter"
    assert [port["port"] for port in calls["ports"]] == ["grpc"]
    assert [port["port"] for port in metrics["ports"]] == ["metrics"]
    assert list(metrics["from"][0]) == ["namespaceSelector"]


def test_the_environment_is_read_and_holds_no_secret(objects: list[dict[str, Any]]) -> None:
    """Every variable is one that a part reads; passwords and keys come from Secrets."""
    for container in containers(objects):
        for entry in container.get("env", ()):
            assert entry["name"] in READ, entry
        named = {entry["name"]: entry for entry in container.get("env", ())}
        assert len(named) == len(container.get("env", ()))
        for name in ("DLLM_DATABASE_URL", "TRITON_PROTOCOL_KEY", "HF_TOKEN"):
            assert "value" not in named.get(name, {})


def test_adapters_find_every_triton_pod(objects: list[dict[str, Any]]) -> None:
    """DLLM_TRITON_URL names the headless Service of Triton, and is a valid setting."""
    (adapter,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    (url,) = (e["value"] for e in adapter["env"] if e["name"] == "DLLM_TRITON_URL")
    service = one(objects, "Service", "triton")
    assert Settings(triton_url=url).triton_urls == [
        f"{service['metadata']['name']}.serving.svc:{service['spec']['ports'][0]['port']}"
    ]
    assert service["spec"]["clusterIP"] == "None"
    assert one(objects, "StatefulSet")["spec"]["serviceName"] == service["metadata"]["name"]


def test_files_are_mounted_where_settings_name_them(objects: list[dict[str, Any]]) -> None:
    """Each path in the environment or command of a container lies on one of its volumes."""
    for pod in pods(objects):
        volumes = {volume["name"] for volume in pod.get("volumes", ())} | {"model"}
        for container in pod["containers"]:
            mounts = container.get("volumeMounts", ())
            assert {mount["name"] for mount in mounts} <= volumes
            texts = [entry.get("value", "") for entry in container.get("env", ())]
            texts += container.get("args", ())
            for path in re.findall(r"(?:/etc/dllm-serve|/models|/run)/[\w./-]+", " ".join(texts)):
                assert any(path.startswith(mount["mountPath"]) for mount in mounts), path


def test_streams_pass_the_ingress(releases: Any) -> None:
    """No proxy of it buffers events or cuts held polls, and /metrics is not published."""
    ingress = one(releases["full"], "Ingress")
    annotations = ingress["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > 60
    paths = {p["path"]: p["pathType"] for p in ingress["spec"]["rules"][0]["http"]["paths"]}
    assert paths["/v1"] == "Prefix"
    assert paths["/"] == "Exact"
    assert "/metrics" not in paths


def test_alerts_are_those_of_the_deployment(releases: Any) -> None:
    """The chart's copy of the alert rules is up to date, and its braces are left to Prometheus."""
    rules = yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text())
    assert one(releases["full"], "PrometheusRule")["spec"] == rules


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "database"),
        ({"database": {"existingSecret": ""}}, "existingSecret"),
        ({**MINIMAL, "tritn": {}}, "tritn"),
        ({**MINIMAL, "triton": {"gpu": 1}}, "gpu"),
        ({**MINIMAL, "triton": {"replicas": "2"}}, "replicas"),
        ({**MINIMAL, "adapter": {"image": {"tag": "latest"}}}, "tag"),
        ({**MINIMAL, "settings": {"MAX_GEN_LENGTH": 3}}, "MAX_GEN_LENGTH"),
        ({**MINIMAL, "ingress": {"enabled": True}}, "host"),
        ({**MINIMAL, "triton": {"terminationGracePeriodSeconds": 5}}, "terminationGracePeriod"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], said: str) -> None:
    """A value that is misspelt, missing or of a wrong type is named."""
    with (
        helm_python.Chart.load(CHART) as chart,
        pytest.raises(helm_python.HelmValuesError, match=said),
    ):
        chart.validate_schema(values)


def test_every_value_has_a_type() -> None:
    """values.schema.json and values.yaml have the same keys."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(values: Any, part: Any, where: str) -> None:
        part = schema["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if isinstance(values, dict) and values and "properties" in part:
            assert set(values) == set(part["properties"]) - {"global"}, where
            for name, value in values.items():
                check(value, part["properties"][name], f"{where}.{name}")

    check(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


def test_the_page_names_every_value() -> None:
    """docs/kubernetes.md explains the sections of values.yaml."""
    page = (Path(__file__).parents[2] / "docs/kubernetes.md").read_text()
    for section in yaml.safe_load((CHART / "values.yaml").read_text()):
        assert f"`{section}" in page, section
