"""Tell a person at a terminal, or a log file, how the stack is doing."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from types import TracebackType
from typing import Self

import typer
from dllm_client import DllmError
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from launcher.errors import LaunchError

stderr = Console(stderr=True, soft_wrap=True, highlight=False)

#: Without a terminal there is no spinner; then a line is printed this often.
PLAIN_SECONDS = 5.0
#: Level, date, time, thread and place in the source, as Triton begins its lines.
TRITON_PREFIX = re.compile(r"^[IWE]\d{4} \S+ \d+ [\w.]+:\d+\] ")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn expected errors into a message on stderr and exit code 1."""
    try:
        yield
    except ValidationError as error:
        for problem in error.errors():
            given = "_".join(str(part) for part in problem["loc"]).upper()
            name = f"DLLM_{given}={problem['input']!r}: " if given else ""
            stderr.print(name + problem["msg"].removeprefix("Value error, "), markup=False)
        raise typer.Exit(1) from None
    except (LaunchError, DllmError, OSError) as error:  # the last: a file that cannot be read
        stderr.print("dllm:", str(error), markup=False)
        raise typer.Exit(1) from None


def wants_json(ctx: typer.Context, behind: bool) -> bool:
    """Whether --json stands behind the command or, with `dllm`, before it."""
    return behind or bool(ctx.obj and ctx.obj["json"])


class Logs(Enum):
    """Which log lines of the parts are printed."""

    NONE = auto()
    READY = auto()  #: those of parts that have finished loading
    ALL = auto()


class ConsoleReporter:
    """A spinner with the newest log line while a part loads, and a line per event."""

    def __init__(self, console: Console, logs: Logs) -> None:
        self._console = console
        self._logs = logs
        self._status = Status("starting", console=console)
        self._ready: set[str] = set()
        self._next_plain = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.quiet()

    def quiet(self) -> None:
        """Take the spinner away."""
        self._status.stop()

    def waiting(self, part: str, seconds: float, last_line: str) -> None:
        self._ready.discard(part)
        message = f"{part}: starting, {seconds:.0f} s"
        newest = TRITON_PREFIX.sub("", last_line)[: max(0, self._console.width - len(message) - 5)]
        if self._console.is_terminal:
            self._status.update(f"{message}  [dim]{escape(newest)}[/dim]")
        elif seconds >= self._next_plain:
            self._next_plain = seconds + PLAIN_SECONDS
            self._print(f"{message}  {newest}")

    def ready(self, part: str, seconds: float) -> None:
        self._ready.add(part)
        self._next_plain = 0.0
        self._print(f"{part}: ready after {seconds:.1f} s", "green")

    def log(self, part: str, line: str) -> None:
        if self._logs is Logs.ALL or (self._logs is Logs.READY and part in self._ready):
            self._print(f"{part} | {line}", "dim")

    def trouble(self, message: str) -> None:
        self._print(message, "bold red")

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
