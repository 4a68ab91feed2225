"""`dllm doctor`: looks at this machine and at the service, and says what to do about what is wrong.

Each check is a function that yields findings. None of them changes anything.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import httpx
import typer
from dllm_client import Client, DllmError

from launcher.console import one_line_errors, wants_json
from launcher.errors import LaunchError
from launcher.installation import find_installation
from launcher.ports import require_free_port
from launcher.setting_names import misspelt
from launcher.settings import Settings

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

#: Packages of the engine, of the service, and of clients.
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "fastapi",
    "tritonclient",
    "nvidia-pytriton",
    "httpx",
)
#: Shared memory below which Triton's Python backend has failed to start or to grow.
SHM_BYTES = 256 * 2**20
#: Seconds by which two machines' clocks may differ before leases and deadlines suffer.
CLOCK_SECONDS = 5.0
#: Columns of `nvidia-smi` that are asked for.
GPU_FIELDS = ("name", "memory.total", "memory.used", "driver_version", "clocks.sm", "clocks.max.sm")


class State(StrEnum):
    """How a check ended; only `fail` makes the exit code 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    state: State
    message: str


Check = Iterator[Finding]


@app.command()
def doctor(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option(help="Address of the service [DLLM_URL].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check versions, ports, shared memory, proxies, GPU, clocks and the service.

    The exit code is 1 if anything is wrong that keeps the service from working.
    """
    with one_line_errors():
        settings = Settings.with_options()
        before = ctx.obj or {}
        named = url or before.get("url")
        findings = [
            *versions(),
            *variables(os.environ),
            *shared_memory(Path("/dev/shm")),
            *memory(),
            *gpus(_nvidia_smi),
            *service(named or settings.url, before.get("api_key"), expected=named is not None),
            *ports(settings),
        ]
    if wants_json(ctx, as_json):
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for one in findings:
            print(f"{one.state.upper():<5} {one.check:<14} {one.message}")
    if any(finding.state is State.FAIL for finding in findings):
        raise typer.Exit(1)


def versions() -> Check:
    """Versions of the program and its parts, and whether there is a tritonserver."""
    yield Finding("dllm-serve", State.OK, metadata.version("dllm-serve"))
    for package in PACKAGES:
        try:
            yield Finding(package, State.OK, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, State.WARN, "not installed; what needs it does not run here")
    try:
        yield Finding("tritonserver", State.OK, str(find_installation().binary))
    except LaunchError as error:
        yield Finding("tritonserver", State.WARN, str(error))


def variables(env: Mapping[str, str]) -> Check:
    """Settings that are misspelt, and proxies."""
    for warning in misspelt(env):
        yield Finding("settings", State.WARN, warning)
    proxies = sorted(name for name in env if name.lower() in ("http_proxy", "all_proxy"))
    if not any(env[name] for name in proxies):
        yield Finding("proxies", State.OK, "none for http://")
        return
    skipped = env.get("no_proxy") or env.get("NO_PROXY") or "none"
    names = ", ".join(proxies)
    message = f"{names} set; hosts that bypass it: {skipped}. Loopback always does"
    yield Finding("proxies", State.WARN, message)


def shared_memory(folder: Path) -> Check:
    """Room for Triton's Python backend, and regions that dead servers left."""
    if not folder.is_dir():
        yield Finding("shared memory", State.FAIL, f"{folder} is missing")
        return
    free = shutil.disk_usage(folder).free
    message = f"{free / 2**20:,.0f} MiB free in {folder}"
    if free < SHM_BYTES:
        message += f"; give it {SHM_BYTES // 2**20} MiB: docker run --shm-size=1g"
    yield Finding("shared memory", State.OK if free >= SHM_BYTES else State.FAIL, message)
    stale = [p for p in folder.glob("dllm_*") if not _alive(p.name)]
    if stale:
        size = sum(path.stat().st_size for path in stale) / 2**20
        names = f"{folder}/{stale[0].name.rpartition('_')[0]}*"
        message = f"{len(stale)} regions ({size:,.0f} MiB) of servers that ended here: rm {names}"
        yield Finding("shared memory", State.WARN, message)


def _alive(region: str) -> bool:
    """Whether the process that named a region `dllm_PID_…` is there."""
    found = re.match(r"dllm_(\d+)_", region)
    return found is None or Path(f"/proc/{found[1]}").exists()


def memory() -> Check:
    """Memory and processors that this process may use, and how they are clocked."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(found[1]) / 2**20 if found else 0.0
    cores = len(os.sched_getaffinity(0))
    yield Finding("machine", State.OK, f"{cores} processors, {free:.1f} GiB of memory available")
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.is_file() and (name := governor.read_text().strip()) == "powersave":
        message = (
            f"the governor is {name}; figures will vary: cpupower frequency-set -g performance"
        )
        yield Finding("clocks", State.WARN, message)


def gpus(query: Callable[[], str | None]) -> Check:
    """GPUs with their memory, driver and clocks, and whether PyTorch can use them."""
    report = query()
    if report is None:
        yield Finding("gpu", State.OK, "none (no nvidia-smi); the engine runs on the CPU")
        return
    for line in report.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(GPU_FIELDS):
            yield Finding("gpu", State.FAIL, f"nvidia-smi: {line}")
            continue
        name, total, used, driver, clock, most = values
        message = f"{name}, {used} of {total} MiB used, driver {driver}, {clock} of {most} MHz"
        yield Finding("gpu", State.OK, message)
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return
    if torch.endswith("+cpu"):
        message = f"torch {torch} cannot use the GPU; install a CUDA build"
        yield Finding("gpu", State.FAIL, message)


def _nvidia_smi() -> str | None:
    """What nvidia-smi says of each GPU, a line each; None if this machine has none."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = f"--query-gpu={','.join(GPU_FIELDS)}"
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "no answer within 20 s"
    return (done.stdout or done.stderr).strip()


def service(url: str, api_key: str | None, *, expected: bool) -> Check:
    """Whether the service answers prompts, and how far its clock is from ours."""
    try:
        with Client(url, api_key=api_key, timeout=5.0) as client:
            status = client.health()
        yield Finding("service", State.OK, f"{url}: {status}")
        yield from _clock(url)
    except DllmError as error:
        state = State.FAIL if expected else State.WARN
        start = "" if expected else "; start it with: dllm serve"
        yield Finding("service", state, f"{error}{start}")


def _clock(url: str) -> Check:
    """Compares the clock of the service's machine with ours."""
    try:
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        reply = httpx.get(f"{url}/v1/livez", timeout=5.0, trust_env=not local)
        ahead = parsedate_to_datetime(reply.headers["Date"]).timestamp() - time.time()
    except (httpx.HTTPError, KeyError, ValueError) as error:
        yield Finding("clocks", State.WARN, f"the service told no time: {error}")
        return
    if abs(ahead) <= CLOCK_SECONDS:
        yield Finding("clocks", State.OK, "the service's clock is ours")
    else:
        way = "ahead of" if ahead > 0 else "behind"
        message = f"the service's clock is {abs(ahead):.0f} s {way} ours; run NTP on both"
        yield Finding("clocks", State.WARN, message)


def ports(settings: Settings) -> Check:
    """Whether the ports that `dllm serve` takes are free."""
    for what, address, port, setting in (
        ("REST API's", settings.host, settings.port, "DLLM_PORT"),
        ("Triton's HTTP", "127.0.0.1", settings.triton_http_port, "DLLM_TRITON_HTTP_PORT"),
        ("Triton's gRPC", "127.0.0.1", settings.triton_grpc_port, "DLLM_TRITON_GRPC_PORT"),
        ("Triton's metrics", "127.0.0.1", settings.triton_metrics_port, "DLLM_TRITON_METRICS_PORT"),
    ):
        try:
            require_free_port(what, address, port, setting)
        except LaunchError as error:
            yield Finding(f"port {port}", State.WARN, f"{error}; fine if it is this service")
        else:
            yield Finding(f"port {port}", State.OK, f"free ({setting})")
