"""Shows a denoising on a terminal. Into a pipe, it writes text as it becomes final."""

import json
from collections.abc import Iterable
from dataclasses import asdict

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm_client._types import Answer, Step

MASK = "░"


def watch(events: Iterable[Step | Answer], *, as_json: bool) -> None:
    """Show events until the answer; as JSON, one event per line."""
    console = Console()
    if as_json:
        for event in events:
            typer.echo(json.dumps(asdict(event), ensure_ascii=False))
    elif console.is_terminal:
        _show(events, console)
    else:
        _print_final(events)


def _show(events: Iterable[Step | Answer], console: Console) -> None:
    text = ""
    with Live(console=console, transient=True) as live:
        for event in events:
            if isinstance(event, Step):
                live.update(canvas(event))
            else:
                text = event.text
    typer.echo(text)


def canvas(step: Step) -> Text:
    """The canvas with its masks; new tokens stand out."""
    new = {one.position for one in step.committed}
    shown = Text()
    for position, text in enumerate(step.canvas):
        style = "dim" if text is None else "bold green" if position in new else ""
        shown.append(MASK if text is None else text, style)
    return shown


def _print_final(events: Iterable[Step | Answer]) -> None:
    printed = 0
    for event in events:
        text = event.text if isinstance(event, Answer) else event.final_text
        typer.echo(text[printed:], nl=isinstance(event, Answer))
        printed = len(text)
