"""`dllm serve`, `triton` and `demo`: run the service, or watch it at work once.

The command `dllm-serve` has the same three.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from dllm_client import Client
from rich.console import Console

from launcher import demo as demonstration
from launcher.checkpoint import find_checkpoint
from launcher.console import ConsoleReporter, Logs, one_line_errors
from launcher.models import described
from launcher.repository import add_model
from launcher.setting_names import misspelt
from launcher.settings import Settings
from launcher.stack import Stack, check_model_path, triton_server

app = typer.Typer(
    help="Serve diffusion language models. Settings are environment variables, DLLM_*.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

Model = Annotated[
    str | None,
    typer.Argument(help="A checkpoint's directory, or the id of one that `hf download` fetched."),
]
Host = Annotated[str | None, typer.Option(help="Address of the REST API [DLLM_HOST].")]
Port = Annotated[int | None, typer.Option(help="Port of the REST API [DLLM_PORT].")]
Workers = Annotated[int | None, typer.Option(help="Adapter processes [DLLM_WORKERS].")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every log line.")]


@app.command()
def serve(
    model: Model = None,
    host: Host = None,
    port: Port = None,
    workers: Workers = None,
    verbose: Verbose = False,
) -> None:
    """Run Triton with the engine, and the REST API in front of it, until Ctrl-C.

    Without MODEL it serves MODEL_PATH, or else the demo checkpoint.
    """
    with _service_errors():
        settings = Settings.with_options(host=host, port=port, workers=workers)
        env = {} if model is None else {"MODEL_PATH": str(find_checkpoint(model))}
        reporter = ConsoleReporter(console, Logs.ALL if verbose else Logs.READY)
        with suppress(KeyboardInterrupt), reporter, Stack(settings, reporter, env) as stack:
            reporter.quiet()
            _announce(settings)
            stack.watch(threading.Event())
        console.print("stopped")


@app.command()
def triton(verbose: Verbose = False) -> None:
    """Run Triton with the engine alone, until Ctrl-C; the adapter is started elsewhere."""
    with _service_errors():
        settings = Settings.with_options()
        reporter = ConsoleReporter(console, Logs.ALL if verbose else Logs.READY)
        for warning in misspelt(os.environ):
            reporter.trouble(f"warning: {warning}")
        check_model_path(os.environ)
        with suppress(KeyboardInterrupt), reporter, triton_server(settings, reporter) as server:
            reporter.quiet()
            _print_addresses(
                ("Triton", f"http://{server.http_url}   gRPC {server.grpc_url}"),
                ("metrics", server.metrics_url),
            )
            server.wait()
        console.print("stopped")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The model's name in calls and at Triton.")],
    model: Annotated[str, typer.Argument(help="A checkpoint's directory, or its id on the Hub.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of its engine, DLLM_NAME=VALUE; may be repeated."),
    ] = None,
    server_path: Annotated[
        str | None,
        typer.Option(help="Where the server finds the checkpoint, if elsewhere (a container)."),
    ] = None,
) -> None:
    """Add a model to the repository: `serve` then serves it, too, in a process of its own.

    The engine says here whether it would serve the checkpoint with these settings.
    """
    with one_line_errors():
        given = dict(map(_assignment, set_ or ()))
        checkpoint = find_checkpoint(model)
        repository = Settings.with_options().model_repository
        found = described(checkpoint, given)
        folders = add_model(repository, name, server_path or str(checkpoint), given)
    for folder in folders:
        console.print(f"made {folder}", highlight=False, soft_wrap=True)
    console.print(f"{name}: {found['architecture']}; restart the server to serve it", markup=False)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"must be DLLM_NAME=VALUE, not {text!r}", param_hint="--set")
    return name, value


@app.command()
def demo(
    port: Port = None,
    verbose: Verbose = False,
    two: Annotated[
        bool, typer.Option("--two", help="Serve two models, LLaDA's and Dream's demo checkpoints.")
    ] = False,
) -> None:
    """Start everything, run the deployment guide's own requests, print the texts, stop."""
    with _service_errors(), tempfile.TemporaryDirectory(prefix="dllm-demo-") as folder:
        settings = Settings.with_options(port=port, workers=1)
        if two:
            repository = demonstration.two_models(settings.model_repository, Path(folder))
            settings = Settings.with_options(port=port, workers=1, model_repository=repository)
        env = {"DLLM_DATABASE_URL": f"sqlite:///{Path(folder) / 'jobs.db'}"}
        reporter = ConsoleReporter(console, Logs.ALL if verbose else Logs.NONE)
        with reporter, Stack(settings, reporter, env):
            reporter.quiet()
            with Client(settings.url) as client:
                finished = demonstration.run(client, console, two=two)
    if not finished:
        raise typer.Exit(1)


def _announce(settings: Settings) -> None:
    _print_addresses(
        ("REST API", f"{settings.url}/v1   described at {settings.url}/docs"),
        ("page", f"{settings.url}/   shows a text being denoised"),
        ("Triton", f"http://127.0.0.1:{settings.triton_http_port}"),
        ("gRPC", f"127.0.0.1:{settings.triton_grpc_port}"),
        ("metrics", f"http://127.0.0.1:{settings.triton_metrics_port}/metrics"),
    )


def _print_addresses(*rows: tuple[str, str]) -> None:
    for name, address in rows:
        console.print(f"{name:>10}  {address}", highlight=False, soft_wrap=True)
    console.print("Ctrl-C stops it.")


@contextmanager
def _service_errors() -> Iterator[None]:
    """Like `one_line_errors`, and a signal that ends a process is Ctrl-C."""
    # SIGTERM, which service managers send, ends the service as Ctrl-C does; and so does SIGINT
    # where a shell started us in the background, with that signal ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    with one_line_errors():
        yield


if __name__ == "__main__":
    app()
