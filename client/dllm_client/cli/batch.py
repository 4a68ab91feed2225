"""`dllm batch`: a file of prompts in, a file of answers out; goes on where an earlier run ended."""

import hashlib
import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer

from dllm_client._client import IN_FLIGHT, Client
from dllm_client._errors import BadRequestError, DllmError
from dllm_client._progress import progress_bar
from dllm_client._types import Outcome, Params, Request
from dllm_client.cli.generate import WaitTimeout
from dllm_client.cli.options import command, stderr
from dllm_client.cli.output import print_text

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

#: A line of JSON has one of these.
PROMPT_FIELDS = ("prompt", "messages", "input_ids")
SURROGATE = re.compile("[\ud800-\udfff]")
#: How a line of the answers begins.
ANSWER_BEGINS = b'{"line": '


@dataclass(frozen=True)
class Line:
    """A line of the input that holds a request."""

    number: int  #: from 1
    text: str
    name: Any = None  #: the line's own `id`

    @property
    def key(self) -> str:
        """What tells this line from another one at its place."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@command(app)
def batch(
    file: Annotated[Path, typer.Argument(help="One request a line; - reads standard input.")],
    client: Client,
    params: Params,
    as_json: bool,
    out: Annotated[
        Path | None, typer.Argument(help="File for the answers; default: standard output.")
    ] = None,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Lines are JSON even if FILE is not named *.jsonl.")
    ] = False,
    in_flight: Annotated[int, typer.Option(min=1, help="Most jobs at once.")] = IN_FLIGHT,
    wait_timeout: WaitTimeout = None,
) -> None:
    """Answer each line of a file, in order, a bounded number at once.

    In a file *.jsonl each line is a JSON string, the prompt, or a JSON object with `prompt`,
    `messages` or `input_ids`, any fields of the request, and an `id` of your own. In any other
    file each line that is not blank is a prompt. With OUT, each answer is a line of JSON with the
    number of its input line; if OUT exists, the run goes on behind its last answer. A line that
    fails has an `error` in its place and does not stop the others; the exit code is 1 then. Ctrl-C
    cancels the jobs in flight.
    """
    failed = 0
    ahead: deque[Line] = deque()
    as_json_lines = jsonl or file.suffix == ".jsonl"
    with _opened(file) as source, _writer(out, as_json) as (write, done):
        lines = _skip(_lines(source), done, out)
        items = _requests(lines, ahead, as_json_lines)
        with progress_bar(None, shown=True) as advance:
            for outcome in client.map(
                items, in_flight=in_flight, wait_timeout=wait_timeout, **params
            ):
                line = ahead.popleft()
                if outcome.error is not None:
                    failed += 1
                    stderr.print("dllm:", f"line {line.number}: {outcome.error}", markup=False)
                write(line, outcome)
                advance()
    if failed:
        raise typer.Exit(1)


@contextmanager
def _opened(file: Path) -> Iterator[IO[str]]:
    if str(file) == "-":
        yield sys.stdin
    else:
        with file.open(encoding="utf-8") as opened:
            try:
                yield opened
            except UnicodeDecodeError as error:
                raise DllmError(f"{file}: must be UTF-8: {error}") from error


def _lines(source: Iterable[str]) -> Iterator[Line]:
    """The lines that are not blank."""
    for number, text in enumerate(source, 1):
        if stripped := text.strip():
            yield Line(number, stripped)


def _requests(lines: Iterable[Line], ahead: deque[Line], jsonl: bool) -> Iterator[Any]:
    """The requests of the lines, each of which is put behind `ahead`; an error for a bad line."""
    for line in lines:
        try:
            request, name = _parse(line.text) if jsonl else (Request(line.text), None)
        except BadRequestError as error:
            ahead.append(line)
            yield error
        else:
            ahead.append(Line(line.number, line.text, name))
            yield request


def _parse(text: str) -> tuple[Request, Any]:
    """The request in a line of JSON, and its `id`; raises BadRequestError for another line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: nested too deep
        raise BadRequestError(f"not JSON: {error}", 400) from error
    if isinstance(value, str):
        return Request(value), None
    if not isinstance(value, dict):
        raise BadRequestError("must be a JSON string or object", 400)
    name = value.pop("id", None)
    if SURROGATE.search(json.dumps(name, ensure_ascii=False)):  # no file can hold it
        raise BadRequestError("id: must be valid Unicode", 400, "id")
    given = [field for field in PROMPT_FIELDS if field in value]
    if len(given) != 1:
        raise BadRequestError(f"must have one of {', '.join(PROMPT_FIELDS)}", 400)
    return Request(value.pop(given[0]), cast(Params, value)), name


def _skip(lines: Iterator[Line], done: Line | None, out: Path | None) -> Iterator[Line]:
    """The lines behind the last one that an earlier run answered.

    Raises:
        DllmError: the earlier run's input had another line there.
    """
    if done is None:
        return lines
    for line in lines:
        if line.number == done.number:
            if line.key == done.text:
                return lines
            break
    raise DllmError(
        f"{out}: its last answer belongs to another input than line {done.number} of this file; "
        "name another file for the answers"
    )


@contextmanager
def _writer(out: Path | None, as_json: bool) -> Iterator[tuple[Any, Line | None]]:
    """A function that writes an answer, and the last line that `out` has an answer for.

    The key of that line stands in place of its text.
    """
    if out is None:
        yield (lambda line, outcome: _print(line, outcome, as_json)), None
        return
    with out.open("a+b") as stream:
        done = _last_answer(stream, out)

        def write(line: Line, outcome: Outcome) -> None:
            stream.write(json.dumps(_answer(line, outcome), ensure_ascii=False).encode() + b"\n")
            stream.flush()

        yield write, done


def _last_answer(stream: IO[bytes], out: Path) -> Line | None:
    """The last complete line; cuts off an incomplete one, which a killed run left.

    Raises:
        DllmError: the file holds something else, and is left as it is.
    """
    last, rest, end = b"", b"", 0
    stream.seek(0)
    for line in stream:
        if not line.endswith(b"\n"):
            rest = line
            break
        last, end = line, end + len(line)
    try:
        if rest[: len(ANSWER_BEGINS)] != ANSWER_BEGINS[: len(rest)]:
            raise ValueError(rest)
        answer = json.loads(last) if last else None
        done = Line(int(answer["line"]), str(answer["key"])) if answer is not None else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DllmError(f"{out}: holds something else than answers of `dllm batch`") from error
    stream.truncate(end)
    stream.seek(0, os.SEEK_END)
    return done


def _print(line: Line, outcome: Outcome, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_answer(line, outcome), ensure_ascii=False))
    elif outcome.error is None:
        print_text(outcome.text)
    else:
        typer.echo("")  # so that answers stay at their places


def _answer(line: Line, outcome: Outcome) -> dict[str, Any]:
    """The answer as a line of JSON has it."""
    head = {"line": line.number, "key": line.key}
    if line.name is not None:
        head["id"] = line.name
    result = asdict(outcome.result) if outcome.result else {}
    return {**head, **result, "error": str(outcome.error) if outcome.error else None}
