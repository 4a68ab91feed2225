"""Shows a denoising in a notebook: which step decoded which token, and how sure the model was.

    from dllm_client import Client
    from dllm_client.notebook import Denoising

    Denoising.of(Client().stream("Tell me about AI", gen_length=64))

The view is HTML with styles of its own: no script, nothing from another server, all text escaped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from dllm_client._errors import StreamError
from dllm_client._types import Answer, Step

#: Seconds of a replay, however many steps there were.
REPLAY_SECONDS = 4.0
#: Least confidence and underline of each class; the shape says what the colour says.
CLASSES = ((0.9, "solid"), (0.5, "dashed"), (0.0, "dotted"))

_STYLE = """
.dllm-denoising { font-family: monospace; line-height: 1.9; white-space: pre-wrap; }
.dllm-denoising span { text-decoration-line: underline; text-decoration-thickness: 2px;
  text-underline-offset: 4px; background: hsl(210 80% 55% / calc(.06 + .34 * var(--at))); }
.dllm-denoising .given, .dllm-denoising .masked { background: none; text-decoration: none; }
.dllm-denoising .masked { opacity: .4; }
.dllm-denoising small { font-family: sans-serif; }
.dllm-denoising input:checked ~ div span.decoded { animation: dllm-decoded .2s both;
  animation-delay: calc(var(--at) * REPLAYs); }
@keyframes dllm-decoded { from { color: transparent; background: hsl(0 0% 50% / .35); } }
""".replace("REPLAY", f"{REPLAY_SECONDS:g}")


@dataclass(frozen=True)
class Denoising:
    """A denoising that has ended, position by position; a notebook shows it as HTML.

    Args:
        pieces: the text that each position adds.
        steps: the step that decoded each position, from 1; 0 where it was given, −1 where never.
        confidence: the probability with which each position was decoded.

    Raises:
        ValueError: the three differ in length.
    """

    pieces: Sequence[str]
    steps: Sequence[int]
    confidence: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.pieces) == len(self.steps) == len(self.confidence):
            raise ValueError("pieces, steps and confidence must have the same length")

    @classmethod
    def of(cls, events: Iterable[Step | Answer]) -> "Denoising":
        """Read a stream to its end.

        Args:
            events: what `Client.stream` yields, or a list of what `AsyncClient.stream` yields.

        Raises:
            StreamError: the stream has no step.
        """
        last: Step | None = None
        decoded: dict[int, tuple[int, float]] = {}
        for event in events:
            if isinstance(event, Step):
                last = event
                decoded |= {one.position: (event.step, one.confidence) for one in event.committed}
        if last is None:
            raise StreamError("the stream has no step to show")
        never = [(0, 1.0) if text is not None else (-1, -1.0) for text in last.canvas]
        seen = [decoded.get(position, default) for position, default in enumerate(never)]
        pieces = [text or "" for text in last.canvas]
        return cls(pieces, [step for step, _ in seen], [sure for _, sure in seen])

    def _repr_html_(self) -> str:
        most = max([1, *self.steps])
        spans = "".join(
            _span(text, int(step), float(sure), most)
            for text, step, sure in zip(self.pieces, self.steps, self.confidence, strict=True)
        )
        classes = ", ".join(f"{line} from {least:g}" for least, line in CLASSES)
        legend = (
            f"{max(0, *self.steps, 0)} steps; darker: later; underlined by confidence: {classes}"
        )
        return (
            f'<div class="dllm-denoising"><style>{_STYLE}</style>'
            f'<input type="checkbox" aria-label="replay"> <small>replay</small>'
            f"<div>{spans}</div><small>{escape(legend)}</small></div>"
        )


def _span(text: str, step: int, confidence: float, most: int) -> str:
    """A position as HTML; what never was decoded is a shade, as on a terminal."""
    if step < 0:
        return '<span class="masked" title="never decoded">░</span>'
    if step == 0:
        return f'<span class="given" title="given">{escape(text)}</span>'
    line = next((line for least, line in CLASSES if confidence >= least), CLASSES[-1][1])
    style = f"--at: {step / most:.3f}; text-decoration-style: {line}"
    title = f"step {step}, confidence {confidence:.2f}"
    return f'<span class="decoded" style="{style}" title="{title}">{escape(text)}</span>'
