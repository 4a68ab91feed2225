"""The view of a denoising in a notebook."""

from html.parser import HTMLParser

import pytest
from dllm_client import Answer, Block, Committed, Step, StreamError, Usage
from dllm_client.notebook import Denoising

BLOCK = Block(0, 0, 4)


def step(number: int, canvas: list[str | None], *new: tuple[int, float]) -> Step:
    committed = [Committed(at, 1, canvas[at] or "", sure) for at, sure in new]
    return Step(number, BLOCK, canvas, committed, "")


EVENTS = [
    step(1, [None, "given", "<b>&", None], (2, 0.95)),
    step(2, ["a ", "given", "<b>&", None], (0, 0.3)),
    Answer("a given<b>&", "stop", Usage(1, 3, 2, 2), 7),
]


class Page(HTMLParser):
    """Collects elements with their attributes, and the text of spans."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1][0] == "span":
            self.texts.append(data)


def test_each_position_has_its_step_and_confidence() -> None:
    """From a stream: positions that were decoded, given, and never decoded."""
    view = Denoising.of(EVENTS)
    assert view == Denoising(["a ", "given", "<b>&", ""], [2, 0, 1, -1], [0.3, 1.0, 0.95, -1.0])
    page = Page(view._repr_html_())
    spans = [attributes for tag, attributes in page.tags if tag == "span"]
    titles = [one["title"] for one in spans]
    assert titles == [
        "step 2, confidence 0.30",
        "given",
        "step 1, confidence 0.95",
        "never decoded",
    ]
    assert ["solid" in (one.get("style") or "") for one in spans] == [False, False, True, False]
    assert page.texts[:4] == ["a ", "given", "<b>&", "░"]


def test_the_view_runs_nothing_and_loads_nothing() -> None:
    """Text of a model stays text, and there is neither a script nor an address."""
    hostile = '"><script src="http://x">&amp;'
    source = Denoising([hostile], [1], [0.5])._repr_html_()
    page = Page(source)
    assert page.texts[0] == hostile
    assert {tag for tag, _ in page.tags} == {"div", "style", "input", "small", "span"}
    assert not any(
        name.startswith("on") or name in ("src", "href") for _, a in page.tags for name in a
    )
    assert "url(" not in source


def test_what_cannot_be_shown_is_refused() -> None:
    """Lists of different lengths, and a stream without a step."""
    with pytest.raises(ValueError, match="the same length"):
        Denoising(["a"], [1, 2], [0.5])
    with pytest.raises(StreamError, match="no step"):
        Denoising.of(EVENTS[2:])
    assert "0 steps" in Denoising([], [], [])._repr_html_()
