"""Shows a denoising on a terminal. Into a pipe, it writes text as it becomes final."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dllm_client._errors import StreamError
from dllm_client._types import Answer, Step
from dllm_client.cli.output import on_terminal, print_json, warn_if_cut

MASK = "░"
#: A line break, a run of other spaces, or a piece of a word.
_PIECE = re.compile(r"\n|[^\S\n]+|\S+")


def watch(events: Iterable[Step | Answer], *, as_json: bool = False) -> Answer:
    """Show events until the answer, print its text and return it; as JSON, one event per line.

    Raises:
        StreamError: there is no answer.
    """
    console = Console()
    if as_json:
        answer = _print_events(events)
    elif console.is_terminal:
        answer = _show(events, console)
    else:
        answer = _print_final(events)
    if answer is None:
        raise StreamError("the stream ended without an answer")
    if not as_json:
        warn_if_cut(answer.finish_reason)
    return answer


def _print_events(events: Iterable[Step | Answer]) -> Answer | None:
    answer = None
    for event in events:
        print_json(asdict(event))
        if isinstance(event, Answer):
            answer = event
    return answer


def _show(events: Iterable[Step | Answer], console: Console) -> Answer | None:
    """The canvas while it changes; then it is replaced with the text."""
    answer = None
    with Live(console=console, transient=True) as live:
        for event in events:
            if isinstance(event, Answer):
                answer = event
            else:
                live.update(_picture(event, console.width, console.height))
    if answer is not None:
        typer.echo(on_terminal(answer.text))
    return answer


def _print_final(events: Iterable[Step | Answer]) -> Answer | None:
    answer, printed = None, 0
    for event in events:
        if isinstance(event, Answer):
            answer = event
        text = event.text if isinstance(event, Answer) else event.final_text
        typer.echo(text[printed:], nl=isinstance(event, Answer))
        printed = len(text)
    return answer


def _picture(step: Step, width: int, height: int) -> Group:
    """As many lines of the canvas as fit, around the current block, and how far it is."""
    lines, current = canvas_lines(step, width)
    room = max(1, height - 2)
    first = max(0, min(current + 1 - room // 2, len(lines) - room))
    decoded = sum(text is not None for text in step.canvas)
    state = Text(f"step {step.step} · {decoded} of {len(step.canvas)} tokens", "dim")
    return Group(*lines[first : first + room], state)


def canvas_lines(step: Step, width: int) -> tuple[list[Text], int]:
    """The canvas in lines of at most `width` cells, and the line in which the block begins.

    A word is never broken, though it may consist of several tokens; a line may end at a mask.
    New tokens stand out.
    """
    lines, current = [Text(no_wrap=True)], 0
    word = Text()  # grows until a space, a mask or a break ends it

    def place(part: Text) -> None:
        if lines[-1].cell_len and lines[-1].cell_len + part.cell_len > width:
            lines.append(Text(no_wrap=True))
        lines[-1].append_text(part)

    for position, kind, text, style in _pieces(step):
        if kind == "word":
            word.append(text, style)
            continue
        place(word)
        word = Text()
        if position == step.block.start:
            current = len(lines) - 1
        if kind == "break":
            lines.append(Text(no_wrap=True))
        elif kind == "mask" or lines[-1].cell_len + len(text) <= width:
            place(Text(text, style))
    place(word)
    return lines, current


def _pieces(step: Step) -> Iterator[tuple[int, str, str, str]]:
    """Position, kind, text and style of the canvas's masks, spaces, breaks and parts of words."""
    new = {one.position for one in step.committed}
    for position, text in enumerate(step.canvas):
        if text is None:
            yield position, "mask", MASK, "dim"
            continue
        style = "bold green" if position in new else ""
        for piece in _PIECE.findall(on_terminal(text)):
            kind = "break" if piece == "\n" else "space" if piece.isspace() else "word"
            yield position, kind, piece, style
