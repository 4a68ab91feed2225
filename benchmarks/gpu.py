"""Runs every GPU measurement in one command: `python -m benchmarks.gpu`.

Each section runs in its own process, so that none leaves memory or a broken device to the next:

- `ceilings`: bandwidth and bfloat16 rate of the card.
- `kernels`: our kernels against the roofline, beside torch's operations and libraries.
- `compile`: `torch.compile` on the parts of a layer, beside torch's operations and ours.
- `engine`: LLaDA-8B's shape with random weights, by load, policy, lengths and rule.
- `baselines`: the reference generate and Fast-dLLM's dual cache in plain torch on the same card.
- `no-graphs`, `no-overlap`, `torch`: the engine without CUDA graphs, with one step at a time, and
  on torch's operations.
- `dream`: Dream-7B's shape.
- `batch-invariant`, `fp8`, `int8`: the engine with these settings.
- `fast-dllm`, `dllm-serve`: those systems' own code, if you give their checkouts.

The sections share `--minutes`; unused time goes to the next, and each section starts with its most
important measurement. The results file is rewritten after every measurement. `--tiny` runs all
sections at toy sizes on the CPU, with Triton's interpreter, to check that they run: its times mean
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Shares of the time; if a section does not run, the others get its share.
SHARES = {
    "ceilings": 0.2,
    "kernels": 1.6,
    "compile": 0.3,
    "engine": 3.4,
    "baselines": 0.6,
    "no-graphs": 0.5,
    "no-overlap": 0.5,
    "torch": 0.5,
    "dream": 0.9,
    "fast-dllm": 0.6,
    "dllm-serve": 0.9,
    "batch-invariant": 0.3,
    "fp8": 0.3,
    "int8": 0.3,
}
_ROOT = Path(__file__).parents[1]
#: The folder of `dllm_engine`, installed or not.
_ENGINE = _ROOT / "model_repository/dllm/1"
#: Seconds over its time after which a section is ended.
_GRACE_SECONDS = 30.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all sections together")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(SHARES),
        metavar="SECTION",
        help="run these and keep the results of the others; a single one runs in this process",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=list(SHARES),
        metavar="SECTION",
        help="leave these out",
    )
    parser.add_argument("--tiny", action="store_true", help="run toy sizes on the CPU; see above")
    parser.add_argument("--results", type=Path, help="folder of gpu.json and gpu.png")
    parser.add_argument("--checkpoints", type=Path, help="folder to keep the random weights in")
    parser.add_argument("--fast-dllm", type=Path, metavar="DIR", help="checkout of Fast-dLLM")
    parser.add_argument("--dllm-serve", type=Path, metavar="DIR", help="checkout of dLLM-Serve")
    parser.add_argument(
        "--checkout-python", default=sys.executable, help="interpreter for the checkouts"
    )
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error("--minutes: must be above 0")
    for name in ("fast-dllm", "dllm-serve"):
        folder = getattr(options, name.replace("-", "_"))
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name}: {folder} is not a folder")
        if folder is None and name in (options.only or ()):
            parser.error(f"--only {name}: needs a checkout; name it with --{name} DIR")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write JSON and plot."""
    options = parse(arguments)
    if options.tiny:
        # triton reads this when it is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
    if str(_ENGINE) not in sys.path:
        sys.path.insert(0, str(_ENGINE))
    # Not at the top: these import triton. Before old results are dropped: without the engine there
    # is nothing to measure.
    import dllm_engine  # noqa: F401
    import torch

    from benchmarks.common import RESULTS
    from benchmarks.gpu_report import Record, plot, table

    with contextlib.ExitStack() as stack:
        for name in ("results", "checkpoints"):
            if getattr(options, name) is None:
                temporary = stack.enter_context(tempfile.TemporaryDirectory())
                keep = name == "results" and not options.tiny
                setattr(options, name, RESULTS if keep else Path(temporary))
        record = Record(options.results, tiny=options.tiny)
        if not options.tiny and not torch.cuda.is_available():
            print(record.unmeasured("no CUDA device is visible to torch on this machine"))
            return
        if options.only is not None and len(options.only) == 1:
            _run_here(options, record)
            return
        if options.only is None:
            record.begin()
        _run_each(options, record)
        for line in table(record.read()):
            print(line)
        drawn = [plot(record.read(), options.results)] if find_spec("matplotlib") else []
        print(record.path, *drawn)


def wanted(options: argparse.Namespace) -> list[str]:
    """Sections to run, in order."""
    missing = {
        name
        for name in ("fast-dllm", "dllm-serve")
        if getattr(options, name.replace("-", "_")) is None
    }
    return [name for name in options.only or SHARES if name not in missing | {*options.without}]


def _run_each(options: argparse.Namespace, record: Any) -> None:
    """Every section in a process of its own, which is this command with `--only`."""
    names = wanted(options)
    end = time.monotonic() + 60 * options.minutes
    command = [sys.executable, "-m", "benchmarks.gpu", "--checkout-python", options.checkout_python]
    command += ["--results", str(options.results), "--checkpoints", str(options.checkpoints)]
    command += ["--tiny"] if options.tiny else []
    for name in ("fast-dllm", "dllm-serve"):
        if name in names:
            command += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    paths = [str(_ENGINE), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for place, name in enumerate(names):
        left = end - time.monotonic()
        mine = left * SHARES[name] / sum(SHARES[later] for later in names[place:])
        if left <= 0:
            print(f"{name}: no time left")
            return
        minutes = ["--minutes", str(mine / 60), "--only", name]
        try:
            ended = subprocess.run(
                [*command, *minutes],
                env=environment,
                timeout=mine + _GRACE_SECONDS,
                check=False,
            )
            if ended.returncode:
                record.fail(name, f"ended with status {ended.returncode}")
        except subprocess.TimeoutExpired:
            record.fail(name, f"took more than {mine + _GRACE_SECONDS:.0f} s")


def _run_here(options: argparse.Namespace, record: Any) -> None:
    from benchmarks.gpu_sections import Section

    (name,) = options.only
    began = time.monotonic()
    end = began + 60 * options.minutes
    Section(name, options, record, left=lambda: end - time.monotonic()).run()
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
