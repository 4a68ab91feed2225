"""What every benchmark shares: where results go, and on what machine they were made."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
DEMO_CHECKPOINT = Path(__file__).parents[1] / "model_repository/dllm/1/demo_checkpoint"
#: Its twin in Dream's format.
DREAM_CHECKPOINT = DEMO_CHECKPOINT.with_name("demo_checkpoint_dream")


def machine() -> dict[str, Any]:
    """Processor, cores and versions, for the record."""
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
    """Speeds of systems by name as a Markdown table, with their ratios to two of these."""
    slow, fast = speeds[reference], speeds[fast_dllm]
    name = f"| {title} " if title else "| "
    lines = [f"{name}| {unit} | × reference | × Fast-dLLM |", "|---|--:|--:|--:|"]
    lines += [
        f"| {name} | {value:.1f} | {value / slow:.1f} | {value / fast:.1f} |"
        for name, value in speeds.items()
    ]
    return "\n".join(lines)


def write_json(name: str, result: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write a result beside its plot."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | result, indent=2) + "\n")
    return path
