"""The `dllm` command: everything about the service, each part loaded when it is asked for.

Exit codes: 0 it worked; 1 it failed, and one line on stderr says why; 2 the arguments are wrong;
130 after Ctrl-C.
"""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

#: Where each command is; a module's `app` holds one or several.
MODULES = {
    "serve": "launcher.cli",
    "triton": "launcher.cli",
    "demo": "launcher.cli",
    "add": "launcher.cli",
    "pull": "launcher.models",
    "inspect": "launcher.models",
    "doctor": "launcher.doctor",
    "chat": "dllm_client.cli.chat",
    "generate": "dllm_client.cli.generate",
    "batch": "dllm_client.cli.batch",
    "bench": "dllm_client.cli.bench",
    "jobs": "dllm_client.cli.jobs",
    "models": "dllm_client.cli.service",
    "health": "dllm_client.cli.service",
}


class Commands(Mapping[str, Any]):
    """Commands by name, imported at first use: `dllm --version` loads none of them."""

    def __getitem__(self, name: str) -> Any:
        try:
            module = importlib.import_module(MODULES[name])
        except ModuleNotFoundError as error:
            return _needing(name, error)
        found = typer.main.get_command(module.app)
        command = getattr(found, "commands", {}).get(name, found)
        command.name = name
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


def _needing(name: str, error: ModuleNotFoundError) -> Any:
    """A command in place of one whose packages are not installed; it says how to install them."""
    extra = "server" if MODULES[name].startswith("launcher") else "client"
    needs = f"needs {error.name}: pip install 'dllm-serve[{extra}]'"
    alone = typer.Typer(add_completion=False)
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}

    @alone.command(name, help=f"({needs})", context_settings=anything)
    def refuse() -> None:
        typer.echo(f"dllm {name}: {needs}", err=True)
        raise typer.Exit(1)

    return typer.main.get_command(alone)


class LazyGroup(TyperGroup):
    """A group of commands that are imported at first use."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = Commands()  # type: ignore[assignment]


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="Exit codes: 0 it worked, 1 it failed, 2 wrong arguments, 130 after Ctrl-C.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dllm {version('dllm-serve')}")
        raise typer.Exit


@app.callback()
def before_command(
    ctx: typer.Context,
    url: Annotated[
        str | None, typer.Option(envvar="DLLM_URL", help="Address of the service.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="DLLM_API_KEY", help="API key, if the service asks for one."),
    ] = None,
    answer_timeout: Annotated[
        float | None, typer.Option(help="Seconds the service may take for an answer.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results as JSON.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Serve diffusion language models, and use them. These options may also follow the command."""
    del show_version
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it, as `>&-` does
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    ctx.obj = {"url": url, "api_key": api_key, "answer_timeout": answer_timeout, "json": as_json}


if __name__ == "__main__":
    app()
