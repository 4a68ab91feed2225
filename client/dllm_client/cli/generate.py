"""`dllm generate`: one prompt, one text."""

from typing import Annotated

import typer

from dllm_client._client import Client
from dllm_client._types import Params
from dllm_client.cli.live import watch
from dllm_client.cli.options import command
from dllm_client.cli.output import cancelled_on_interrupt, print_result
from dllm_client.cli.prompts import Messages, PromptText, read_prompt

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

WaitTimeout = Annotated[
    float | None, typer.Option(min=0, help="Stop waiting after so many seconds.")
]


@command(app)
def generate(
    prompt: PromptText,
    client: Client,
    params: Params,
    as_json: bool,
    messages: Messages = False,
    wait_timeout: WaitTimeout = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Watch the denoising; with --json, event by event.")
    ] = False,
) -> None:
    """Generate a text and print it. Ctrl-C cancels the request."""
    given = read_prompt(prompt, messages)
    if stream:
        if wait_timeout is not None:
            raise typer.BadParameter("--wait-timeout is for jobs; with --stream use --timeout")
        watch(client.stream(given, **params), as_json=as_json)
        return
    request_id = client.submit(given, **params)
    with cancelled_on_interrupt(client, [request_id]):
        finished = client.wait(request_id, wait_timeout)
    print_result(finished, as_json)
