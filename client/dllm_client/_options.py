"""Command-line options that several commands share, declared once.

A command asks for `client` or `params` by naming it as a parameter. The options of `connect` or
`sampling` then appear in its help, and the command is called with what these return.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import typer
from rich.console import Console

from dllm_client._client import DEFAULT_TIMEOUT, DEFAULT_URL, Client
from dllm_client._errors import DllmError
from dllm_client._types import Params, Sampling

#: The exit code after Ctrl-C, as shells have it: 128 and the signal's number.
INTERRUPTED = 130

stderr = Console(stderr=True, soft_wrap=True, highlight=False)

URL_HELP = f"Address of the REST API; default: {DEFAULT_URL}."
API_KEY_HELP = "API key, if the server asks for one."
ANSWER_TIMEOUT_HELP = f"Seconds the server may take for an answer; default: {DEFAULT_TIMEOUT:g}."

AnswerTimeout = Annotated[float | None, typer.Option(help=ANSWER_TIMEOUT_HELP)]


def before_command(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option(envvar="DLLM_URL", help=URL_HELP)] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DLLM_API_KEY", help=API_KEY_HELP)] = None,
    answer_timeout: AnswerTimeout = None,
) -> None:
    """Ask a dLLM-Serve server."""
    ctx.obj = {"url": url, "api_key": api_key, "answer_timeout": answer_timeout}


def connect(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option(help=URL_HELP)] = None,
    api_key: Annotated[str | None, typer.Option(help=API_KEY_HELP)] = None,
    answer_timeout: AnswerTimeout = None,
) -> Client:
    """A client of the server that the options name, before or behind the command."""
    before = ctx.obj
    timeout = before["answer_timeout"] if answer_timeout is None else answer_timeout
    return Client(
        url or before["url"] or DEFAULT_URL,
        api_key=api_key or before["api_key"],
        timeout=DEFAULT_TIMEOUT if timeout is None else timeout,
    )


def sampling(**given: Any) -> Params:
    """The fields of a request. What is not given is left to the server."""
    kept = {name: value for name, value in given.items() if value not in (None, False, [])}
    return cast(Params, kept)


def _option(name: str, hint: Any) -> inspect.Parameter:
    """The option of a request's field: its name with dashes, its type, its description."""
    kind, text = get_args(hint)
    flag = f"--{name.replace('_', '-')}"
    repeated = "; may be repeated" if get_origin(kind) is list else ""
    panel = "Sampling" if name in get_type_hints(Sampling) else "Request"
    first, _, rest = text.partition(" ")
    shown = f"{first.capitalize() if first.islower() else first} {rest}{repeated}."
    option = typer.Option(flag, help=shown, rich_help_panel=panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if kind is bool else None,
        annotation=Annotated[bool if kind is bool else kind | None, option],
    )


sampling.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_option(name, hint) for name, hint in get_type_hints(Params, include_extras=True).items()]
)

PROVIDERS: dict[str, Callable[..., Any]] = {"client": connect, "params": sampling}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an expected error as one line on stderr and exit with 1; after Ctrl-C with 130."""
    try:
        yield
    except (DllmError, OSError, UnicodeError) as error:
        # Not markup: a server's message may hold square brackets.
        stderr.print("dllm:", " ".join(_message(error).split()), markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _message(error: Exception) -> str:
    """The error's text, with the id of the job that was waited for."""
    request_id = error.request_id if isinstance(error, DllmError) else None
    if request_id is None or f"job {request_id}" in str(error):
        return str(error)
    return f"job {request_id}: {error}"


def command(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`, and supply the parameters in PROVIDERS."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function).parameters
        wanted = {name: PROVIDERS[name] for name in own if name in PROVIDERS}
        options = {name: list(inspect.signature(make).parameters) for name, make in wanted.items()}

        @wraps(function)
        def run(**values: Any) -> None:
            with one_line_errors(), ExitStack() as stack:
                for name, make in wanted.items():
                    made = make(**{option: values.pop(option) for option in options[name]})
                    values[name] = stack.enter_context(made) if name == "client" else made
                function(**values)

        parameters = [p for name, p in own.items() if name not in wanted]
        for make in wanted.values():
            parameters += inspect.signature(make).parameters.values()
        # Typer passes everything by keyword, so that no order is wrong.
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command()(run)

    return register
