"""Reads, writes and prints the results file of `benchmarks.gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_json

#: Sections whose rows are loads on the engine.
ENGINES = ("engine", "no-graphs", "no-overlap", "torch", "dream", "batch-invariant", "fp8", "int8")
#: Target: share of the roofline.
TARGETS = {"attention": 0.7, "head": 0.7}
_TINY = "--tiny: toy sizes on the CPU, with Triton's interpreter; times mean nothing"


class Record:
    """`gpu.json`, rewritten with every new result.

    Args:
        directory: its folder.
        tiny: toy sizes; its figures are no measurements.
    """

    def __init__(self, directory: Path, *, tiny: bool) -> None:
        self._directory, self._tiny = directory, tiny
        self.path = directory / "gpu.json"

    def read(self) -> dict[str, Any]:
        """Its content; empty if it is from another machine or from the other kind of run."""
        if self.path.exists():
            found: dict[str, Any] = json.loads(self.path.read_text())
            same_kind = (found.get("why") == _TINY) == self._tiny
            if same_kind and found["machine"] == machine() and "sections" in found:
                return found
        return {"machine": machine(), "sections": {}}

    def begin(self) -> None:
        """Drop old results."""
        self._save({"sections": {}})

    def write(self, section: str, found: Any) -> None:
        """Replace a section's results."""
        known = self.read()
        known["sections"][section] = found
        known.get("failed", {}).pop(section, None)
        self._save(known)

    def fail(self, section: str, why: str) -> None:
        """Record that a section failed; its results so far stay."""
        print(f"{section}: {why}")
        known = self.read()
        known.setdefault("failed", {})[section] = why
        self._save(known)

    def _save(self, known: dict[str, Any]) -> None:
        """Write the file; it begins with whether its figures are measurements."""
        sections, failed = known["sections"], known.get("failed", {})
        heading: dict[str, Any] = {"machine": machine(), "measured": bool(sections)}
        if self._tiny:
            heading |= {"measured": False, "why": _TINY}
        elif not sections:
            heading["why"] = "; ".join(_failures(failed)) or "no section has found anything yet"
        parts = {"sections": sections} | ({"failed": failed} if failed else {})
        write_json("gpu", heading | parts, self._directory)

    def unmeasured(self, why: str) -> str:
        """Write that nothing was measured, unless a measurement exists; the message to print."""
        if self.path.exists() and json.loads(self.path.read_text())["measured"]:
            return f"not measured: {why}; {self.path} is of another machine and stays as it is"
        write_json("gpu", {"measured": False, "why": why}, self._directory)
        return f"not measured: {why}; {self.path} says so"


def label(row: dict[str, Any]) -> str:
    """Name of a load on the engine."""
    words = [row["policy"], f"{row['requests']} requests"]
    words.append(f"{row['prompt_length']} + {row['gen_length']} tokens")
    if row["tokens_per_step"] > 1:
        words.append(f"{row['tokens_per_step']} a step")
    if row["confidence_threshold"] is not None:
        words.append(f"threshold {row['confidence_threshold']}")
    if "arrivals" in row:
        words.append(f"{row['arrivals']} at {row['share_of_capacity']:.0%}")
    return ", ".join(words)


def table(result: dict[str, Any]) -> list[str]:
    """Lines to print."""
    sections = result["sections"]
    lines = _failures(result.get("failed", {}))
    if not result["measured"] and result["why"] != "; ".join(lines):
        lines.insert(0, result["why"])
    ceilings = sections.get("ceilings")
    if ceilings:
        lines.append(
            f"card: {ceilings['bandwidth'] / 1e12:.2f} TB/s, {ceilings['rate'] / 1e12:.0f} TFLOP/s"
        )
    lines += [_kernel_line(row) for row in sections.get("kernels", [])]
    lines += [_compiled_line(row) for row in sections.get("compile", [])]
    for section in ENGINES:
        for row in sections.get(section, {}).get("rows", []):
            lines.append(f"{section:<15} {label(row):<62}{_speed(row)}")
    for row in sections.get("baselines", []):
        lines.append(
            f"{'baseline':<10} {row['system']:<62}{row['tokens_per_second']:9.1f} tokens/s"
        )
    for section in ("fast-dllm", "dllm-serve"):
        found = sections.get(section)
        if found:
            what = found.get("error", "").strip().splitlines()[-1:] or [
                f"{found['tokens_per_second']:9.1f} tokens/s"
            ]
            lines.append(f"{section:<10} {found['requests']} requests: {what[0]}")
    return lines + _ratios(sections)


def _failures(failed: dict[str, str]) -> list[str]:
    """Failed sections, a line each."""
    return [f"{section} failed: {why}" for section, why in failed.items()]


def _kernel_line(row: dict[str, Any]) -> str:
    name = f"{row['kernel']:<10} {row['model']:<12}{row['case']:<66}"
    if "error" in row:
        return f"{name} {row['error']}"
    target = TARGETS.get(row["kernel"])
    missed = " (below target)" if target and row["share_of_roofline"] < target else ""
    libraries = "".join(
        f", {library} {seconds * 1e6:.0f} µs"
        for library, seconds in row.get("library_seconds", {}).items()
    )
    return (
        f"{name}{row['seconds'] * 1e6:9.0f} µs{row['share_of_roofline']:7.0%} of {row['limit']}"
        f"{missed}; torch {row['torch_seconds'] * 1e6:.0f} µs{libraries}"
        f"; agreement {row['agreement']:.3f}"
    )


def _compiled_line(row: dict[str, Any]) -> str:
    times = [f"{how} {seconds * 1e6:.0f} µs" for how, seconds in row["seconds"].items()]
    times += [f"{how}: {why}" for how, why in row["errors"].items()]
    return f"compile    {row['part']:<12}{row['rows']} × {row['width']}: {', '.join(times)}"


def _speed(row: dict[str, Any]) -> str:
    times = "".join(
        f"  {name} {row[f'{name}_seconds']:.2f} s"
        for name in ("p50", "p99")
        if row[f"{name}_seconds"] is not None
    )
    cut = "  (cut off)" if row["cut"] else ""
    peak = row["peak_bytes"] / 2**30
    return f"{row['tokens_per_second']:9.1f} tokens/s{times}  +{peak:.2f} GiB{cut}"


def _is_plain(row: dict[str, Any]) -> bool:
    """Whether the baselines ran this load too: one token per step, a prompt of 128 tokens."""
    return (
        row["tokens_per_step"] == 1
        and row["confidence_threshold"] is None
        and row["prompt_length"] == row["gen_length"] == 128
        and "arrivals" not in row
    )


def _ratios(sections: dict[str, Any]) -> list[str]:
    """Ratios of the engine to each baseline, at one token per step, 128 + 128 tokens."""
    speeds = {
        (row["policy"], row["requests"]): row["tokens_per_second"]
        for row in sections.get("engine", {}).get("rows", [])
        if _is_plain(row)
    }
    others = {row["system"]: row["tokens_per_second"] for row in sections.get("baselines", [])}
    others |= {
        name: sections[name]["tokens_per_second"]
        for name in ("fast-dllm", "dllm-serve")
        if "tokens_per_second" in sections.get(name, {})
    }
    return [
        f"{policy}, {requests} requests, over {other}: {speed / theirs:.1f}×"
        for other, theirs in others.items()
        for (policy, requests), speed in speeds.items()
        if requests == 32
    ]


def plot(result: dict[str, Any], directory: Path) -> Path:
    """Plot the kernels' shares of the roofline, and tokens per second by load and policy."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sections = result["sections"]
    kernels = [row for row in sections.get("kernels", []) if "share_of_roofline" in row]
    height = max(5.0, 0.16 * len(kernels))
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, height))
    names = [f"{row['model']} {row['kernel']} {row['case']}" for row in kernels]
    left.barh(names, [row["share_of_roofline"] for row in kernels])
    left.axvline(0.7, color="gray", linestyle="--", label="aimed at, of attention and head")
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=6)
    left.set_xlabel("share of the roofline")
    left.legend(fontsize=7)
    for section in ENGINES:
        rows = [row for row in sections.get(section, {}).get("rows", []) if _is_plain(row)]
        for policy in dict.fromkeys(row["policy"] for row in rows):
            points = sorted(
                (row["requests"], row["tokens_per_second"])
                for row in rows
                if row["policy"] == policy
            )
            right.plot(*zip(*points, strict=True), marker="o", label=f"{section}: {policy}")
    for row in sections.get("baselines", []):
        right.axhline(row["tokens_per_second"], color="gray", linestyle=":", linewidth=1)
        right.annotate(row["system"], (1, row["tokens_per_second"]), fontsize=6)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("requests at once")
    right.set_ylabel("tokens per second")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=7)
    title = result["machine"]["gpu"] if result["measured"] else result["why"]
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path = directory / "gpu.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
