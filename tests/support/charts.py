"""Renders the Helm chart, and starts what it renders as processes of this machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parents[2] / "deploy/helm/dllm-serve"
MINIMAL: dict[str, Any] = {"database": {"existingSecret": "db"}}
#: Everything that can be turned on at once.
FULL: dict[str, Any] = {
    "settings": {"DLLM_CACHE": "dual", "DLLM_MAX_GEN_LENGTH": 256, "DLLM_TRACING": False},
    "imagePullSecrets": [{"name": "registry"}],
    "database": {"existingSecret": "db", "tlsSecret": "db-tls"},
    "apiKeys": {"existingSecret": "api-keys"},
    "adapter": {
        "autoscaling": {"enabled": True, "waitingRequests": 50},
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "podAnnotations": {"a": "b"},
    },
    "triton": {
        "tls": {"existingSecret": "triton-tls", "name": "triton.example.org"},
        "protocolKey": {"existingSecret": "triton-key"},
        "extraArgs": ["--trace-config=mode=opentelemetry"],
        "keda": {"enabled": True},
    },
    "model": {"download": {"repository": "GSAI-ML/LLaDA-8B-Instruct", "tokenSecret": "hub"}},
    "ingress": {"enabled": True, "host": "dllm.example.org", "tlsSecret": "web"},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
}
CLAIM: dict[str, Any] = {
    **MINIMAL,
    "model": {"existingClaim": "models", "path": "LLaDA-8B-Instruct"},
    "triton": {"replicas": 3, "gpus": 0},
    "adapter": {"replicas": 1},
}


def render(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All objects of a release `demo` in the namespace `serving`."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        files = chart.render(dict(values), name="demo", namespace="serving")
    objects = [found for text in files.values() for found in yaml.safe_load_all(text)]
    return [found for found in objects if found]


def one(objects: Sequence[Mapping[str, Any]], kind: str, name: str = "") -> Any:
    """The only object of a kind whose name ends so."""
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(name))
    return found


def pods(objects: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Specifications of all pods."""
    kinds = ("Deployment", "StatefulSet", "Job")
    return [o["spec"]["template"]["spec"] for o in objects if o["kind"] in kinds]


def containers(objects: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All containers, also those that run before the others."""
    return [
        container
        for pod in pods(objects)
        for container in (*pod.get("initContainers", ()), *pod["containers"])
    ]


class LocalPod:
    """A rendered container's command and environment, with its volumes in a folder of this machine.

    `secrets` maps a Secret's name to its content; `replace` maps texts of the command and of
    settings, such as ports and the image's paths, to this machine's.
    """

    def __init__(
        self,
        pod: Mapping[str, Any],
        folder: Path,
        *,
        secrets: Mapping[str, Mapping[str, str]],
        replace: Mapping[str, str],
    ) -> None:
        (self.container,) = pod["containers"]
        self._secrets = secrets
        self._replace = dict(replace)
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in self.container["volumeMounts"]:
            if mount["mountPath"].startswith(("/tmp", "/dev")):
                continue
            place = folder / mount["name"]
            place.mkdir(parents=True)
            for name, text in self._content(volumes.get(mount["name"], {})).items():
                (place / name).write_text(text)
            self._replace.setdefault(mount["mountPath"], str(place))
        here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.env = {**os.environ, **here, **self._environment()}
        parts = [*self.container.get("command", ()), *self.container.get("args", ())]
        self.command = [self._local(self._expanded(part)) for part in parts]

    def path_of(self, probe: str) -> str:
        """The path that a probe asks for."""
        return str(self.container[probe]["httpGet"]["path"])

    def _content(self, volume: Mapping[str, Any]) -> Mapping[str, str]:
        return self._secrets[volume["secret"]["secretName"]] if "secret" in volume else {}

    def _environment(self) -> dict[str, str]:
        found = {}
        for entry in self.container["env"]:
            if "valueFrom" in entry:
                reference = entry["valueFrom"]["secretKeyRef"]
                found[entry["name"]] = self._secrets[reference["name"]][reference["key"]]
            else:
                found[entry["name"]] = self._local(entry["value"])
        return found

    def _expanded(self, text: str) -> str:
        """As Kubernetes replaces $(NAME) in a command."""
        return re.sub(r"\$\((\w+)\)", lambda found: self.env[found[1]], text)

    def _local(self, text: str) -> str:
        for there, here in self._replace.items():
            text = text.replace(there, here)
        return text
