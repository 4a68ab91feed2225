"""Shared by all benchmarks: where results go, and the machine they were made on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

# All servers of a benchmark are on this machine; no proxy of the environment may stand between.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost,::1"

RESULTS = Path(__file__).parent / "results"
DEMO_CHECKPOINT = Path(__file__).parents[1] / "model_repository/dllm/1/demo_checkpoint"
#: Its twin in Dream's format.
DREAM_CHECKPOINT = DEMO_CHECKPOINT.with_name("demo_checkpoint_dream")
#: The block-wise one, in SDAR's format.
SDAR_CHECKPOINT = DEMO_CHECKPOINT.with_name("demo_checkpoint_sdar")


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def speed_table(
    speeds: dict[str, float], *, unit: str, reference: str, fast_dllm: str, title: str = ""
) -> str:
    """A Markdown table of speeds by system, with their ratios to two of the systems."""
    slow, fast = speeds[reference], speeds[fast_dllm]
    name = f"| {title} " if title else "| "
    lines = [f"{name}| {unit} | × reference | × Fast-dLLM |", "|---|--:|--:|--:|"]
    lines += [
        f"| {name} | {value:.1f} | {value / slow:.1f} | {value / fast:.1f} |"
        for name, value in speeds.items()
    ]
    return "\n".join(lines)


def write_json(name: str, result: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write a result and the machine as JSON; the path."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | result, indent=2) + "\n")
    return path
