"""Prompts that the demo does not know, of many kinds; some kinds are never trained.

A prompt of a held-out kind has words and frames that training never shows, so the score says how
the model answers what it has not seen.
"""

import random
from collections.abc import Callable, Sequence

from demo.texts import OPPOSITES, SPELLED, TOPICS
from demo.words import (
    ADJECTIVES,
    CODE,
    FAR_COUNTRIES,
    FAR_TOPICS,
    FRAMES,
    HELD_OUT_CODE,
    HELD_OUT_FRAMES,
    HELD_OUT_SPEECH,
    HELD_OUT_TOPICS,
    LETTERS,
    NAMES,
    NEAR_FRAMES,
    NOUNS,
    SENTENCES,
    SPEECH,
    SYLLABLES,
    VERBS,
)

KNOWN = frozenset(
    word.lower()
    for group in (SPELLED, *OPPOSITES, *(topic.names for topic in TOPICS))
    for word in group
)
UNKNOWN_NOUNS = tuple(noun for noun in NOUNS if noun not in KNOWN)

Kind = Callable[[random.Random], str]


def _made_up(rng: random.Random) -> str:
    """A word that no language has."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def _noun(rng: random.Random) -> str:
    return _made_up(rng) if rng.random() < 0.3 else rng.choice(UNKNOWN_NOUNS)


def _topic(rng: random.Random) -> str:
    """Something to ask about, from one word to a few."""
    draw = rng.random()
    if draw < 0.3:
        return rng.choice(FAR_TOPICS)
    if draw < 0.5:
        return f"{rng.choice(ADJECTIVES)} {_noun(rng)}"
    return _noun(rng)


def _number(rng: random.Random) -> str:
    return str(rng.randint(100, 10 ** rng.randint(3, 6)))


def fill(frame: str, rng: random.Random) -> str:
    """A frame with its gaps filled by random words."""
    return frame.format(
        x=_topic(rng),
        y=_topic(rng),
        noun=_noun(rng),
        word=_made_up(rng),
        adj=rng.choice(ADJECTIVES),
        verb=rng.choice(VERBS),
        name=rng.choice(NAMES),
        country=rng.choice(FAR_COUNTRIES),
        a=_number(rng),
        b=_number(rng),
        n=rng.randint(2, 20),
    )


def _from(frames: Sequence[str]) -> Kind:
    return lambda rng: fill(rng.choice(frames), rng)


def _salad(rng: random.Random) -> str:
    words = (*NOUNS, *VERBS, *ADJECTIVES, *NAMES)
    return " ".join(
        _made_up(rng) if rng.random() < 0.2 else rng.choice(words)
        for _ in range(rng.randint(1, 12))
    )


def _keys(rng: random.Random) -> str:
    """Keys struck at random."""
    return "".join(rng.choices(rng.choice(LETTERS), k=rng.randint(2, 24)))


def _long_list(rng: random.Random) -> str:
    """A known question about more than the model was trained on."""
    digits = " ".join(str(rng.randrange(10)) for _ in range(rng.randint(6, 14)))
    letters = " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(7, 14)))
    frame = rng.choice(("Sort {d}", "Sort these numbers: {d}", "Reverse {l}", "Write backwards: {l}"))
    return frame.format(d=digits, l=letters)


def _prose(rng: random.Random) -> str:
    """A few sentences, sometimes with a request in front."""
    said = " ".join(fill(rng.choice(SENTENCES), rng) for _ in range(rng.randint(2, 14)))
    ask = rng.choice(("", "", "Summarize: ", "Translate into French: ", "Continue: ", "Fix this: "))
    return ask + said


TRAINED: dict[str, tuple[Kind, float]] = {
    "question": (_from(FRAMES), 0.34),
    "near miss": (_from(NEAR_FRAMES), 0.16),
    "long list": (_long_list, 0.04),
    "other language": (_from(SPEECH), 0.14),
    "code": (_from(CODE), 0.07),
    "word salad": (_salad, 0.09),
    "keys": (_keys, 0.05),
    "prose": (_prose, 0.11),
}
HELD_OUT: dict[str, Kind] = {
    "other questions": _from(HELD_OUT_FRAMES),
    "other topics": lambda rng: rng.choice(("Tell me about {x}", "What is {x}?", "Explain {x}.")).format(
        x=rng.choice(HELD_OUT_TOPICS)
    ),
    "other languages": _from(HELD_OUT_SPEECH),
    "other code": _from(HELD_OUT_CODE),
}


def _carelessly(text: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.15:
        text = text.rstrip("?.!")
    if rng.random() < 0.04:
        text = text.upper()
    return text


def sample(rng: random.Random) -> str:
    """An unknown prompt of a trained kind."""
    kinds = [kind for kind, _ in TRAINED.values()]
    kind = rng.choices(kinds, weights=[share for _, share in TRAINED.values()])[0]
    return _carelessly(kind(rng), rng)


def held_out_set(kind: str, count: int, seed: int = 1) -> list[str]:
    """Up to `count` different prompts of a held-out kind, the same for each seed."""
    rng = random.Random(f"{kind} {seed}")
    return list(dict.fromkeys(HELD_OUT[kind](rng) for _ in range(4 * count)))[:count]
