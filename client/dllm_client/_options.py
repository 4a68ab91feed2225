"""Command-line options that several commands share, declared once.

A command asks for `client` or `params` by naming it as a parameter; the options of `connect` or
`sampling` then appear in its help, and it is called with what these made of them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console

from dllm_client._client import DEFAULT_TIMEOUT, DEFAULT_URL, Client
from dllm_client._errors import DllmError
from dllm_client._types import Params

#: The exit code of a command that Ctrl-C ended, as shells have it: 128 and the signal's number.
INTERRUPTED = 130

stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def connect(
    url: Annotated[
        str, typer.Option(envvar="DLLM_URL", help="Address of the REST API.")
    ] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option(envvar="DLLM_API_KEY", help="API key, if the server wants one.")
    ] = None,
    answer_timeout: Annotated[
        float, typer.Option(help="Seconds the server may take for one answer.")
    ] = DEFAULT_TIMEOUT,
) -> Client:
    """A client of the server that the options name."""
    return Client(url, api_key=api_key, timeout=answer_timeout)


def sampling(
    gen_length: Annotated[int | None, typer.Option(help="Canvas length in tokens.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; default: one per token.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the answer repeatable.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens per block.")] = None,
    remasking: Annotated[str | None, typer.Option(help="Rule that picks what to commit.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Commit every token above this confidence at once.")
    ] = None,
    alg: Annotated[
        str | None, typer.Option(help="Dream's origin, maskgit_plus, topk_margin or entropy.")
    ] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of the distribution.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Number of candidates.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="none, prefix, dual, sparse or delayed.")
    ] = None,
    priority: Annotated[int | None, typer.Option(help="1 is served first, 3 last.")] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which the server gives it up.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: the prompt as is.")] = False,
) -> Params:
    """The fields of a request; what was not given is left to the server."""
    given: dict[str, Any] = {
        "gen_length": gen_length,
        "steps": steps,
        "temperature": temperature,
        "seed": seed,
        "block_length": block_length,
        "remasking": remasking,
        "confidence_threshold": threshold,
        "alg": alg,
        "cfg_scale": cfg_scale,
        "top_p": top_p,
        "top_k": top_k,
        "stop": stop or None,
        "cache": cache,
        "priority": priority,
        "timeout": deadline,
        "raw": raw or None,
    }
    params: Params = {}
    params.update({name: value for name, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    return params


PROVIDERS: dict[str, Callable[..., Any]] = {"client": connect, "params": sampling}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What can be expected to go wrong is one line on stderr and exit code 1; Ctrl-C is 130."""
    try:
        yield
    except (DllmError, OSError, UnicodeError) as error:
        # Not markup: a server's message may hold square brackets.
        stderr.print("dllm:", " ".join(_message(error).split()), markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _message(error: Exception) -> str:
    """What went wrong; of a job that was waited for, with the id to come back for it with."""
    request_id = error.request_id if isinstance(error, DllmError) else None
    if request_id is None or f"job {request_id}" in str(error):
        return str(error)
    return f"job {request_id}: {error}"


def command(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`, filling in what it asks for."""

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
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command()(run)

    return register
