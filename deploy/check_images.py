"""Run both images and check what this folder promises of them.

    docker build --target adapter -t dllm-serve-adapter .
    docker build --target triton -t dllm-serve-triton .
    python deploy/check_images.py dllm-serve-adapter dllm-serve-triton

The containers have no network but the loopback that they share, so no port of the machine is used.
All of them are removed at the end. Takes about three minutes on two cores.
"""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

PATIENCE = 300.0
#: Beside the adapter, which has port 8000.
TRITON = [
    *("tritonserver", "--model-repository=/opt/dllm-serve/model_repository"),
    *("--disable-auto-complete-config", "--exit-timeout-secs=30", "--http-port=8010"),
]
STUB = "triton_python_backend_stub"
KILL_STUB = f"""
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    command = (folder / "cmdline").read_bytes().split(b"\\0")
    if command[0].endswith(b"{STUB}") and b"dllm_0_0" in b" ".join(command):
        os.kill(int(folder.name), signal.SIGKILL)
"""


class Container:
    """A container that is removed when its context ends."""

    def __init__(self, image: str, *arguments: str, command: list[str] | None = None) -> None:
        self.name = f"dllm-check-{uuid.uuid4().hex[:8]}"
        self._run = ["run", "-d", "--name", self.name, *arguments, image, *(command or [])]

    def __enter__(self) -> "Container":
        docker(*self._run)
        return self

    def __exit__(self, *_: object) -> None:
        docker("rm", "--force", "--volumes", self.name, check=False)

    def inspect(self, path: str) -> str:
        """A field of the container's state, such as `.State.Status`."""
        return docker("inspect", "--format", f"{{{{{path}}}}}", self.name).strip()

    def run(self, *command: str) -> str:
        """The output of a command inside."""
        return docker("exec", self.name, *command)

    def log(self) -> str:
        """The last lines that it wrote."""
        return docker("logs", "--tail", "30", self.name, check=False)


def docker(*arguments: str, check: bool = True) -> str:
    """Run docker and return its output; exit with its error if it fails."""
    run = subprocess.run(
        ["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if check and run.returncode:
        sys.exit(f"docker {' '.join(arguments)}: {run.stdout}")
    return run.stdout


def eventually(what: str, container: Container, condition: Callable[[], bool]) -> float:
    """Wait until it holds; the seconds that it took. Exits with the container's log if not."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > PATIENCE:
            sys.exit(f"not within {PATIENCE:.0f} s: {what}\n{container.log()}")
        time.sleep(0.2)
    seconds = time.monotonic() - began
    report(f"{what} ({seconds:.1f} s)")
    return seconds


def report(line: str) -> None:
    """Tell what holds."""
    sys.stdout.write(f"ok: {line}\n")
    sys.stdout.flush()


def is_healthy(container: Container) -> bool:
    """Whether Docker's own check of the image has passed."""
    return container.inspect(".State.Health.Status") == "healthy"


def adapter_health(adapter: Container) -> bool:
    """Whether the adapter would take calls."""
    script = (
        "from urllib.request import *\n"
        "try: build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/v1/health')\n"
        "except OSError: print('no')\n"
        "else: print('yes')"
    )
    return adapter.run("python", "-c", script).strip() == "yes"


def check_stop(container: Container, grace: int) -> None:
    """`docker stop` ends it in order, well within the time that Compose allows."""
    began = time.monotonic()
    docker("stop", "--time", str(grace), container.name)
    seconds, status = time.monotonic() - began, container.inspect(".State.ExitCode")
    if status == "137" or seconds > grace - 2:
        sys.exit(f"stopped with {status} after {seconds:.1f} s\n{container.log()}")
    report(f"a stop took {seconds:.1f} of {grace} s, exit status {status}")


def check_triton_alone(image: str, *, init: bool) -> None:
    """Health, the death of an engine under a restart policy, and a stop."""
    report(f"Triton {'under an init process' if init else 'as process 1'}:")
    arguments = ["--network=none", "--shm-size=1g", "--restart=unless-stopped"]
    with Container(image, *arguments, *(["--init"] if init else [])) as triton:
        eventually("it is healthy", triton, lambda: is_healthy(triton))
        before = int(triton.inspect(".RestartCount"))
        triton.run("python3", "-c", KILL_STUB)
        eventually(
            "the container starts again after its engine was killed",
            triton,
            lambda: int(triton.inspect(".RestartCount")) > before,
        )
        eventually("it is healthy again", triton, lambda: is_healthy(triton))
        check_stop(triton, 40)


def check_together(adapter_image: str, triton_image: str) -> None:
    """Jobs, streams, the death of an engine, a proxy in the environment, and a stop that drains."""
    report("both together, with a proxy in the environment that is away:")
    proxies = ["-e", "http_proxy=http://127.0.0.1:9", "-e", "grpc_proxy=http://127.0.0.1:9"]
    settings = ["-e", "DLLM_TRITON_URL=127.0.0.1:8001", "-e", "WEB_CONCURRENCY=2"]
    metrics = ["--tmpfs=/run/dllm-metrics:uid=10001,mode=0700"]
    metrics += ["-e", "PROMETHEUS_MULTIPROC_DIR=/run/dllm-metrics"]
    beside = ["--shm-size=1g", "--init", "--restart=unless-stopped"]
    with (
        Container(adapter_image, "--network=none", *proxies, *settings, *metrics) as adapter,
        Container(
            triton_image, f"--network=container:{adapter.name}", *beside, command=TRITON
        ) as triton,
    ):
        eventually(
            "the adapter is healthy while Triton loads", adapter, lambda: is_healthy(adapter)
        )
        eventually("the service takes calls", adapter, lambda: adapter_health(adapter))
        ask(adapter)
        triton.run("python3", "-c", KILL_STUB)
        eventually("the engine's death is seen", adapter, lambda: not adapter_health(adapter))
        eventually("the service takes calls again", adapter, lambda: adapter_health(adapter))
        if not is_healthy(adapter):
            sys.exit("the adapter is unhealthy because an engine died")
        ask(adapter)
        for page in ("/docs", "/static/swagger/swagger-ui-bundle.js", "/metrics"):
            adapter.run(
                "python",
                "-c",
                "from urllib.request import *; "
                f"build_opener(ProxyHandler({{}})).open('http://127.0.0.1:8000{page}')",
            )
        report("the pages are there")
        check_stop(adapter, 30)
        check_stop(triton, 40)


def ask(adapter: Container) -> None:
    """One job and one stream, by the command that the image brings."""
    prompt = "What is the capital of France?"
    job = adapter.run("dllm", "--url", "http://127.0.0.1:8000", "generate", prompt)
    if "Paris" not in job:
        sys.exit(f"a job answered {job!r}")
    stream = adapter.run(
        "python",
        "-c",
        "import json; from urllib.request import *\n"
        f"body = json.dumps({{'prompt': {prompt!r}, 'gen_length': 32}}).encode()\n"
        "request = Request('http://127.0.0.1:8000/v1/generate/stream', body,"
        " {'Content-Type': 'application/json'})\n"
        "print(build_opener(ProxyHandler({})).open(request).read().decode())",
    )
    if "event: done" not in stream or "Paris" not in stream:
        sys.exit(f"a stream answered {stream!r}")
    report("a job and a stream are answered")


def main() -> None:
    """Check both images, alone and together."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    _, adapter, triton = sys.argv
    user = json.loads(
        docker("inspect", adapter, triton, "--format", "{{json .Config.User}}").split()[0]
    )
    if user in ("", "root", "0"):
        sys.exit("the adapter's image runs as root")
    check_triton_alone(triton, init=False)
    check_triton_alone(triton, init=True)
    check_together(adapter, triton)


if __name__ == "__main__":
    main()
