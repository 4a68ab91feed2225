"""The `dllm` command: ask a dLLM-Serve server from a shell."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dllm_client._client import Client
from dllm_client._errors import BadRequestError, DllmError
from dllm_client._options import before_command, command, stderr
from dllm_client._progress import progress_bar
from dllm_client._types import Params, Prompt, Result
from dllm_client._watch import watch

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.callback()(before_command)

PromptText = Annotated[str, typer.Argument(help="The prompt; - reads standard input.")]
Messages = Annotated[
    bool, typer.Option("--messages", help="The prompt is a JSON list of chat messages.")
]
Id = Annotated[int, typer.Argument(help="The job's id.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")]
WaitTimeout = Annotated[float | None, typer.Option(help="Stop waiting after so many seconds.")]


@command(app)
def generate(
    prompt: PromptText,
    client: Client,
    params: Params,
    messages: Messages = False,
    as_json: Json = False,
    wait_timeout: WaitTimeout = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Watch the denoising; with --json, event by event.")
    ] = False,
) -> None:
    """Generate a text and print it. Ctrl-C cancels the request."""
    given = _read_prompt(prompt, messages)
    if stream:
        if wait_timeout is not None:
            raise typer.BadParameter("--wait-timeout is for jobs; with --stream use --timeout")
        watch(client.stream(given, **params), as_json=as_json)
        return
    request_id = client.submit(given, **params)
    with _cancelled_on_interrupt(client, [request_id]):
        finished = client.wait(request_id, wait_timeout)
    _print(finished, as_json)


@command(app)
def batch(
    file: Annotated[Path, typer.Argument(help="One prompt a line; - reads standard input.")],
    client: Client,
    params: Params,
    as_json: Json = False,
    wait_timeout: WaitTimeout = None,
) -> None:
    """Generate a text for each line of a file and print them in order.

    With --json, one line of JSON for each. --wait-timeout is for all of them together. The file
    may be longer than what the server takes in one call. A failed job does not stop the others;
    the exit code is 1 then. Ctrl-C cancels the jobs that are not finished.
    """
    text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    prompts = [line for line in text.splitlines() if line.strip()]
    waiting: list[int] = []
    failed = False

    def show(result: Result) -> None:
        nonlocal failed
        if result.problem:
            failed = True
            stderr.print("dllm:", result.problem, markup=False)
        _print(result, as_json)
        del waiting[0]
        advance()

    with (
        _cancelled_on_interrupt(client, waiting),
        progress_bar(len(prompts), shown=True) as advance,
    ):
        client.run_batch(
            prompts, wait_timeout=wait_timeout, on_submit=waiting.extend, on_result=show, **params
        )
    if failed:
        raise typer.Exit(1)


@command(app)
def submit(prompt: PromptText, client: Client, params: Params, messages: Messages = False) -> None:
    """Queue a prompt and print the id of its job."""
    typer.echo(client.submit(_read_prompt(prompt, messages), **params))


@command(app)
def result(
    request_id: Id,
    client: Client,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job is done.")] = False,
    as_json: Json = False,
    wait_timeout: WaitTimeout = None,
) -> None:
    """Print the text of a job, or its state while it has no text."""
    _print(client.wait(request_id, wait_timeout) if wait else client.result(request_id), as_json)


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


def _read_prompt(prompt: str, messages: bool) -> Prompt:
    """The prompt as the client takes it."""
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not messages:
        return text
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise BadRequestError(f"messages: {error}", 400, "messages") from error
    if not isinstance(parsed, list) or not all(isinstance(one, dict) for one in parsed):
        raise BadRequestError("messages: must be a JSON list of objects", 400, "messages")
    return parsed


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(result), ensure_ascii=False))
    else:
        reason = f": {result.error}" if result.error else ""
        typer.echo(f"{result.status}{reason}" if result.text is None else result.text)


if __name__ == "__main__":
    app()
