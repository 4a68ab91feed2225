"""What commands print, and what they do on Ctrl-C."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import typer

from dllm_client._client import Client
from dllm_client._errors import DllmError
from dllm_client._types import Result
from dllm_client.cli.options import stderr

#: Characters that steer a terminal; a model may write them as any others.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CUT = "the answer was cut at its length (finish_reason: length); raise --gen-length"


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def on_terminal(text: str) -> str:
    """The text, with control characters replaced, so that none can steer the terminal."""
    return _CONTROL.sub("\ufffd", text)


def print_text(text: str) -> None:
    """Print a model's text: as it is into a pipe, without control characters on a terminal."""
    typer.echo(on_terminal(text) if sys.stdout.isatty() else text)


def print_result(result: Result, as_json: bool) -> None:
    """Print the text of a job, or its state while it has none; on stderr, that it was cut."""
    if as_json:
        print_json(asdict(result))
        return
    reason = f": {result.error}" if result.error else ""
    print_text(f"{result.status}{reason}" if result.text is None else result.text)
    warn_if_cut(result.finish_reason)


def warn_if_cut(finish_reason: str | None) -> None:
    """Say on stderr that an answer ended because its canvas did."""
    if finish_reason == "length":
        stderr.print("dllm:", CUT, markup=False)


@contextmanager
def cancelled_on_interrupt(client: Client, request_ids: Sequence[int]) -> Iterator[None]:
    """On Ctrl-C, cancel the jobs that `request_ids` holds at that moment."""
    try:
        yield
    except KeyboardInterrupt:
        for request_id in request_ids:
            # Its id comes first: after a second Ctrl-C the user can still cancel it by hand.
            stderr.print(f"dllm: cancelling job {request_id}")
            try:
                client.cancel(request_id)
            except DllmError as error:
                stderr.print("dllm:", f"job {request_id} may go on:", str(error), markup=False)
                break
        raise
