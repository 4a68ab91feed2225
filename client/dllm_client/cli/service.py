"""`dllm models` and `dllm health`: what the service is."""

import typer

from dllm_client._client import Client
from dllm_client.cli.options import command
from dllm_client.cli.output import print_json

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@command(app)
def models(client: Client, as_json: bool) -> None:
    """Print the names of the models that OpenAI's calls may ask for."""
    names = client.models()
    if as_json:
        print_json(names)
    else:
        typer.echo("\n".join(names))


@command(app)
def health(client: Client, as_json: bool) -> None:
    """Print `ok`; exit code 1, with the reason, while the service cannot answer prompts."""
    status = client.health()
    if as_json:
        print_json({"status": status})
    else:
        typer.echo(status)
