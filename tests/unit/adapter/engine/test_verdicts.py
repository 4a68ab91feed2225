"""What an engine need not be asked."""

import json

from hypothesis import given
from hypothesis import strategies as st

from adapter.engine.validation_cache import MAX_SHAPES, Verdicts
from adapter.types import Inputs

LIMIT = 64
texts = st.text(max_size=40)
fields = st.fixed_dictionaries({"gen_length": st.integers(1, 3)})


def num_tokens(inputs: Inputs, merged: str) -> int:
    """Bytes, of which those of one character are a token, and a template around each message."""
    count = 0
    for message in json.loads(str(inputs["messages"])):
        text = message["content"]
        count += 5 + len(text.encode()) - text.count(merged) * (len(merged.encode()) - 1)
    return count


def chat(*contents: str, **rest: int) -> Inputs:
    """A chat of a user with himself."""
    messages = [{"role": "user", "content": content} for content in contents]
    return {"messages": json.dumps(messages), **rest}


@given(st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), fields)), st.characters())
def test_nothing_is_covered_that_would_be_refused(
    asked: list[tuple[list[str], dict[str, int]]], merged: str
) -> None:
    """Whatever was taken before: what is covered fits, by any tokenizer that starts from bytes."""
    verdicts = Verdicts()
    for contents, rest in asked:
        inputs = chat(*contents, **rest)
        room = LIMIT - num_tokens(inputs, merged) - 10 * rest["gen_length"]
        if verdicts.cover(inputs, 0):
            assert room >= 0
        elif room >= 0:
            verdicts.add(inputs, 0, room=room)


def test_the_largest_room_counts() -> None:
    """A longer prompt leaves less room, which says nothing against what a shorter one left."""
    verdicts = Verdicts()
    verdicts.add(chat("short"), 0, room=50)
    verdicts.add(chat("a longer one"), 0, room=40)
    assert verdicts.cover(chat("x" * 50), 0)
    assert not verdicts.cover(chat("x" * 51), 0)


def test_only_the_newest_shapes_are_remembered() -> None:
    """Callers who never repeat themselves do not fill the memory."""
    verdicts = Verdicts()
    for length in range(MAX_SHAPES + 1):
        verdicts.add(chat("a", gen_length=length), 0, room=10)
    assert not verdicts.cover(chat("a", gen_length=0), 0)
    assert verdicts.cover(chat("a", gen_length=MAX_SHAPES), 0)
