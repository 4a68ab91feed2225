"""`dllm chat`: a conversation, each answer shown while it is denoised."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated

import typer

from dllm_client._client import Client
from dllm_client._errors import BadRequestError
from dllm_client._types import Answer, Params
from dllm_client.cli.live import watch
from dllm_client.cli.options import command, stderr
from dllm_client.cli.output import print_json, warn_if_cut

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

HELP = "/new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@command(app)
def chat(
    client: Client,
    params: Params,
    as_json: bool,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
) -> None:
    """Talk to the model, turn by turn. Piped in, each line is a turn.

    /new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer.
    """
    beginning = [{"role": "system", "content": system}] if system is not None else []
    messages = list(beginning)
    for text in _turns():
        if text == "/quit":
            return
        if text == "/new":
            messages = list(beginning)
            continue
        turn = [*messages, {"role": "user", "content": text}]
        answer = _answer(client, turn, params, as_json)
        if answer is not None:
            messages = [*turn, {"role": "assistant", "content": answer.text}]


def _turns() -> Iterator[str]:
    """What the user says: lines of a terminal, with a prompt, or of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - input() has a history and arrow keys then
    stderr.print(HELP, style="dim")
    with suppress(EOFError):
        while True:
            if text := input("> ").strip():
                yield text


def _answer(
    client: Client, turn: list[dict[str, str]], params: Params, as_json: bool
) -> Answer | None:
    """Show the answer to a turn; None if the user stopped it, or the service refused it."""
    begun = time.monotonic()
    try:
        if as_json:
            answer = next(e for e in client.stream(turn, **params) if isinstance(e, Answer))
            print_json(asdict(answer))
            warn_if_cut(answer.finish_reason)
            return answer
        answer = watch(client.stream(turn, **params))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stderr.print("stopped", style="dim")
        return None
    except BadRequestError as error:  # such as a conversation that has become too long
        if not sys.stdin.isatty():
            raise
        stderr.print("dllm:", str(error), markup=False)
        return None
    if sys.stdin.isatty():
        usage, seconds = answer.usage, time.monotonic() - begun
        counts = f"{usage.completion_tokens} tokens, {usage.steps} steps, {seconds:.1f} s"
        stderr.print(counts, style="dim")
    return answer
