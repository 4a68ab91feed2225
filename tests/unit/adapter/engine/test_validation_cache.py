"""The cache of accepted request shapes."""

import json

from hypothesis import given
from hypothesis import strategies as st

from adapter.engine.validation_cache import MAX_SHAPES, ValidationCache
from adapter.types import Inputs

LIMIT = 64
texts = st.text(max_size=40)
fields = st.fixed_dictionaries({"gen_length": st.integers(1, 3)})


def num_tokens(inputs: Inputs, merged: str) -> int:
    """Tokens of a byte-level tokenizer that merges one character, with a template per message."""
    count = 0
    for message in json.loads(str(inputs["messages"])):
        text = message["content"]
        count += 5 + len(text.encode()) - text.count(merged) * (len(merged.encode()) - 1)
    return count


def chat(*contents: str, **rest: int) -> Inputs:
    """A chat with user messages only."""
    messages = [{"role": "user", "content": content} for content in contents]
    return {"messages": json.dumps(messages), **rest}


@given(
    st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), fields)),
    st.characters(codec="utf-8"),
)
def test_nothing_is_covered_that_would_be_refused(
    asked: list[tuple[list[str], dict[str, int]]], merged: str
) -> None:
    """A covered request fits, under any byte-level tokenizer."""
    cache = ValidationCache()
    for contents, rest in asked:
        inputs = chat(*contents, **rest)
        room = LIMIT - num_tokens(inputs, merged) - 10 * rest["gen_length"]
        if cache.covers(inputs, 0):
            assert room >= 0
        elif room >= 0:
            cache.add(inputs, 0, headroom=room)


def test_the_largest_headroom_counts() -> None:
    """The largest headroom of a shape counts."""
    cache = ValidationCache()
    cache.add(chat("short"), 0, headroom=50)
    cache.add(chat("a longer one"), 0, headroom=40)
    assert cache.covers(chat("x" * 50), 0)
    assert not cache.covers(chat("x" * 51), 0)


def test_only_the_newest_shapes_are_remembered() -> None:
    """The cache keeps a bounded number of shapes."""
    cache = ValidationCache()
    for length in range(MAX_SHAPES + 1):
        cache.add(chat("a", gen_length=length), 0, headroom=10)
    assert not cache.covers(chat("a", gen_length=0), 0)
    assert cache.covers(chat("a", gen_length=MAX_SHAPES), 0)
