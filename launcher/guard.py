"""Run one command so that nothing of it outlives the process that asked for it.

Run as a script, with the standard library only: `python guard.py OPTIONS -- COMMAND ...`.
Its standard input is a pipe that the launcher holds open. The pipe closes when the launcher
lets go of it or dies, however it dies; then the command is told to stop, its whole process
group is killed, and the shared memory and scratch folder it was given are removed. A parent
death signal alone cannot do this: it reaches one process, while a hung Triton stub is a
grandchild that ignores everything but SIGKILL.
"""

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
SHARED_MEMORY = Path("/dev/shm")
POLL_SECONDS = 0.2


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM at the guard's death, for the case that the guard is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_for_end(child: subprocess.Popen[bytes]) -> None:
    """Return when the command has ended or the launcher has let go of our standard input."""
    while child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 64):
            return


def stop(child: subprocess.Popen[bytes], grace: float) -> int:
    """SIGTERM to the command, SIGKILL after `grace` seconds, SIGKILL to what is left of its group.

    Returns the exit status as a shell reports it: 128 + n after signal n.
    """
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    status = child.wait()
    return 128 - status if status < 0 else status


def remove_leftovers(shm_prefix: str, scratch: Path | None) -> None:
    """Remove the scratch folder and the regions whose names begin with this server's prefix."""
    if shm_prefix:
        for region in SHARED_MEMORY.glob(f"{shm_prefix}*"):
            region.unlink(missing_ok=True)
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)


def raise_exit(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's signature
    """Turn a signal into an exception, so that the `finally` in main() runs."""
    raise SystemExit(128 + signum)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pid-fd", type=int, required=True, help="where the child's pid goes")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--shm-prefix", default="", help="shared memory to remove at the end")
    parser.add_argument("--scratch", type=Path, help="folder to remove at the end")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, raise_exit)
    signal.signal(signal.SIGINT, raise_exit)
    try:
        return run(options.command, options.pid_fd, options.grace)
    except OSError as error:
        sys.exit(f"cannot run {options.command[0]}: {error.strerror}")
    finally:
        remove_leftovers(options.shm_prefix, options.scratch)


def run(command: list[str], pid_fd: int, grace: float) -> int:
    """Run the command to its end, or to ours; raises OSError when it cannot be run."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=die_with_parent
    )
    try:
        os.write(pid_fd, str(child.pid).encode())
        os.close(pid_fd)
        wait_for_end(child)
    finally:
        # A second signal must not interrupt the clean-up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = stop(child, grace)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
