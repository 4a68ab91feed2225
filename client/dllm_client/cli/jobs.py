"""`dllm jobs`: submit, look at, wait for and cancel jobs."""

from typing import Annotated

import typer

from dllm_client._client import Client
from dllm_client._types import Params
from dllm_client.cli.generate import WaitTimeout
from dllm_client.cli.options import command
from dllm_client.cli.output import print_result
from dllm_client.cli.prompts import Messages, PromptText, read_prompt

app = typer.Typer(
    help="Queue prompts as jobs, and wait for, look at and cancel them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Id = Annotated[int, typer.Argument(help="The job's id.", min=0)]


@command(app)
def submit(prompt: PromptText, client: Client, params: Params, messages: Messages = False) -> None:
    """Queue a prompt and print the id of its job."""
    typer.echo(client.submit(read_prompt(prompt, messages), **params))


@command(app)
def status(request_id: Id, client: Client, as_json: bool) -> None:
    """Print the text of a job, or its state while it has no text."""
    print_result(client.result(request_id), as_json)


@command(app)
def wait(request_id: Id, client: Client, as_json: bool, wait_timeout: WaitTimeout = None) -> None:
    """Wait until a job has ended, and print its text. Ctrl-C leaves the job running."""
    print_result(client.wait(request_id, wait_timeout), as_json)


@command(app)
def cancel(request_id: Id, client: Client, as_json: bool) -> None:
    """Cancel a job and print its state."""
    cancelled = client.cancel(request_id)
    if as_json:
        print_result(cancelled, as_json)
    else:
        typer.echo(cancelled.status)
