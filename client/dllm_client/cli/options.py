"""Command-line options that several commands share, declared once.

A command asks for `client`, `server`, `params` or `as_json` by naming it as a parameter. The
options of its provider then appear in its help, and the command is called with what that returns.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import typer
from rich.console import Console

from dllm_client._client import DEFAULT_TIMEOUT, DEFAULT_URL, AsyncClient, Client
from dllm_client._errors import DllmError
from dllm_client._types import Params, Sampling

#: The exit code after Ctrl-C, as shells have it: 128 and the signal's number.
INTERRUPTED = 130

stderr = Console(stderr=True, soft_wrap=True, highlight=False)

URL_HELP = f"Address of the service [DLLM_URL]; default: {DEFAULT_URL}."
API_KEY_HELP = "API key, if the service asks for one [DLLM_API_KEY]."
ANSWER_TIMEOUT_HELP = f"Seconds the service may take for an answer; default: {DEFAULT_TIMEOUT:g}."


@dataclass(frozen=True)
class Server:
    """Where the service is, and how to call it."""

    url: str
    api_key: str | None
    timeout: float

    def connect(self) -> Client:
        """A blocking client."""
        return Client(self.url, api_key=self.api_key, timeout=self.timeout)

    def connect_async(self) -> AsyncClient:
        """A client for asyncio."""
        return AsyncClient(self.url, api_key=self.api_key, timeout=self.timeout)


def server(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option(help=URL_HELP)] = None,
    api_key: Annotated[str | None, typer.Option(help=API_KEY_HELP)] = None,
    answer_timeout: Annotated[float | None, typer.Option(help=ANSWER_TIMEOUT_HELP)] = None,
) -> Server:
    """The service that the options name, before or behind the command."""
    before = ctx.obj
    timeout = before["answer_timeout"] if answer_timeout is None else answer_timeout
    return Server(
        url or before["url"] or DEFAULT_URL,
        api_key or before["api_key"],
        DEFAULT_TIMEOUT if timeout is None else timeout,
    )


def as_json(
    ctx: typer.Context,
    json_: Annotated[bool, typer.Option("--json", help="Print results as JSON.")] = False,
) -> bool:
    """Whether to print JSON."""
    return bool(json_ or ctx.obj["json"])


def sampling(
    *, set_: list[str] | None = None, json_schema: Path | None = None, **given: Any
) -> Params:
    """The fields of a request. What is not given is left to the server."""
    for name in _OBJECTS:
        if given.get(name) is not None:
            given[name] = _object(given[name], f"--{name.replace('_', '-')}")
    if json_schema is not None:
        if given["structured_outputs"] is not None:
            message = "cannot be combined with --structured-outputs"
            raise typer.BadParameter(message, param_hint="--json-schema")
        schema = _object(json_schema.read_text(encoding="utf-8"), "--json-schema")
        given["structured_outputs"] = {"json": schema}
    # By identity: 0 is a value that was given, though it equals False.
    kept = {n: v for n, v in given.items() if v is not None and v is not False and v != []}
    return cast(Params, kept | dict(map(_assignment, set_ or ())))


def _object(text: str, option: str) -> Any:
    """A JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"is no JSON: {error}", param_hint=option) from error
    if not isinstance(value, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=option)
    return value


#: What the client's methods take beside the fields of a request.
_ARGUMENTS = {
    parameter.name
    for method in (Client.submit, Client.stream, Client.map)
    for parameter in inspect.signature(method).parameters.values()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
}


def _assignment(text: str) -> tuple[str, Any]:
    """Name and value of `name=value`; a value that is no JSON is a string."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name:
        raise typer.BadParameter(f"must be name=value, not {text!r}", param_hint="--set")
    if name in _ARGUMENTS:
        message = f"{name} must be given as the command's own argument or option"
        raise typer.BadParameter(message, param_hint="--set")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _option(name: str, hint: Any) -> inspect.Parameter:
    """The option of a request's field: its name with dashes, its type, its description."""
    kind, text = get_args(hint)
    flag = f"--{name.replace('_', '-')}"
    repeated = "; may be repeated" if get_origin(kind) is list else ""
    panel = "Sampling" if name in get_type_hints(Sampling) else "Request"
    first, _, rest = text.partition(" ")
    shown = f"{first.capitalize() if first.islower() else first} {rest}{repeated}."
    if get_origin(kind) is dict:
        kind, shown = str, f"{shown.removesuffix('.')}; as JSON."
    option = typer.Option(flag, help=shown, rich_help_panel=panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if kind is bool else None,
        annotation=Annotated[bool if kind is bool else kind | None, option],
    )


SET_HELP = "Any field by its name: name=value, the value as JSON or as text; may be repeated."
_SET = inspect.Parameter(
    "set_",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        list[str] | None, typer.Option("--set", help=SET_HELP, rich_help_panel="Request")
    ],
)
SCHEMA_HELP = "A file with the JSON schema that the answer must be valid under."
_SCHEMA = inspect.Parameter(
    "json_schema",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None, typer.Option("--json-schema", help=SCHEMA_HELP, rich_help_panel="Sampling")
    ],
)
_FIELDS = get_type_hints(Params, include_extras=True).items()
#: Fields that hold an object.
_OBJECTS = [name for name, hint in _FIELDS if get_origin(get_args(hint)[0]) is dict]
sampling.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [*(_option(name, hint) for name, hint in _FIELDS), _SCHEMA, _SET]
)


def connect(ctx: typer.Context, **options: Any) -> Client:
    """A client of the service that the options name."""
    return server(ctx, **options).connect()


connect.__signature__ = inspect.signature(server)  # type: ignore[attr-defined]

PROVIDERS: dict[str, Callable[..., Any]] = {
    "client": connect,
    "server": server,
    "params": sampling,
    "as_json": as_json,
}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an expected error as one line on stderr and exit with 1; after Ctrl-C with 130."""
    try:
        yield
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
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
            ctx = values.pop("ctx", None)
            with one_line_errors(), ExitStack() as stack:
                for name, make in wanted.items():
                    given = {o: values.pop(o) for o in options[name] if o != "ctx"}
                    made = make(**given, **({"ctx": ctx} if "ctx" in options[name] else {}))
                    values[name] = stack.enter_context(made) if name == "client" else made
                function(**values)

        parameters = {name: p for name, p in own.items() if name not in wanted}
        for make in wanted.values():
            parameters |= inspect.signature(make).parameters
        # Typer passes everything by keyword, so that no order is wrong.
        keyword = inspect.Parameter.KEYWORD_ONLY
        keywords = [p.replace(kind=keyword) for p in parameters.values()]
        run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        run.__annotations__ = {name: p.annotation for name, p in parameters.items()}
        return app.command()(run)

    return register
