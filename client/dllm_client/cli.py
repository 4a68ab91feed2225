"""The `dllm` command: ask a dLLM-Serve server from a shell."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dllm_client._client import Client
from dllm_client._errors import DllmError, JobError
from dllm_client._options import command, stderr
from dllm_client._progress import progress_bar
from dllm_client._types import Params, Result
from dllm_client._watch import watch

app = typer.Typer(
    help="Ask a dLLM-Serve server.", no_args_is_help=True, pretty_exceptions_enable=False
)

Prompt = Annotated[str, typer.Argument(help="The prompt; - reads standard input.")]
Id = Annotated[int, typer.Argument(help="The job's id.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")]
Timeout = Annotated[float | None, typer.Option(help="Give up waiting after so many seconds.")]


@command(app)
def generate(
    prompt: Prompt,
    client: Client,
    params: Params,
    as_json: Json = False,
    timeout: Timeout = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Watch the denoising; with --json, event by event.")
    ] = False,
) -> None:
    """Generate a text and print it. Ctrl-C cancels it."""
    if stream:
        if timeout is not None:
            raise typer.BadParameter("--timeout is for jobs; with --stream use --deadline")
        watch(client.stream(_read(prompt), **params), as_json=as_json)
        return
    request_id = client.submit(_read(prompt), **params)
    with _cancelled_on_interrupt(client, [request_id]):
        finished = client.wait(request_id, timeout)
    _print(finished, as_json)


@command(app)
def batch(
    file: Annotated[Path, typer.Argument(help="One prompt a line; - reads standard input.")],
    client: Client,
    params: Params,
    as_json: Json = False,
    timeout: Timeout = None,
) -> None:
    """Generate a text for each line of a file and print them in order.

    With --json, one line of JSON for each. --timeout is for all of them together. A failed job
    does not stop the others; the exit code is 1 then. Ctrl-C cancels those that are not done.
    """
    text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    prompts = [line for line in text.splitlines() if line.strip()]
    waiting = client.submit_batch(prompts, **params)
    deadline = None if timeout is None else time.monotonic() + timeout
    failed = False
    with (
        _cancelled_on_interrupt(client, waiting),
        progress_bar(len(prompts), shown=True) as advance,
    ):
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                result = client.wait(waiting[0], left)
            except JobError as error:
                failed, result = True, error.result
                stderr.print("dllm:", str(error), markup=False)
            _print(result, as_json)
            del waiting[0]
            advance()
    if failed:
        raise typer.Exit(1)


@command(app)
def submit(prompt: Prompt, client: Client, params: Params) -> None:
    """Queue a prompt and print the id of its job."""
    typer.echo(client.submit(_read(prompt), **params))


@command(app)
def result(
    request_id: Id,
    client: Client,
    wait: Annotated[bool, typer.Option("--wait", help="Until the job is done.")] = False,
    as_json: Json = False,
    timeout: Timeout = None,
) -> None:
    """Print the text of a job, or its state while it has none."""
    _print(client.wait(request_id, timeout) if wait else client.result(request_id), as_json)


@command(app)
def cancel(request_id: Id, client: Client) -> None:
    """Cancel a job and print its state."""
    typer.echo(client.cancel(request_id).status)


@command(app)
def health(client: Client) -> None:
    """Print `ok`; exit code 1, with the reason, while the server cannot serve."""
    typer.echo(client.health())


@contextmanager
def _cancelled_on_interrupt(client: Client, request_ids: Sequence[int]) -> Iterator[None]:
    """What nobody waits for any more need not run; `request_ids` are looked at only then."""
    try:
        yield
    except KeyboardInterrupt:
        for request_id in request_ids:
            # First its id: whoever interrupts this, too, can still cancel it by hand.
            stderr.print(f"dllm: cancelling job {request_id}")
            try:
                client.cancel(request_id)
            except DllmError as error:
                stderr.print("dllm:", f"job {request_id} may go on:", str(error), markup=False)
                break
        raise


def _read(prompt: str) -> str:
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(result), ensure_ascii=False))
    else:
        reason = f": {result.error}" if result.error else ""
        typer.echo(f"{result.status}{reason}" if result.text is None else result.text)


if __name__ == "__main__":
    app()
