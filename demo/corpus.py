"""Questions and answers of the demo tasks, with a fixed split into training and held-out.

Every answer is a function of its question, so exact match is a fair score. A checksum alone decides
the split: it is the same in every process and for every seed.
"""

import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from demo.texts import CAPITALS, MONTHS, OPPOSITES, SMALL_TALK, SPELLED, TOPICS, WEEKDAYS


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its only right answer."""

    task: str
    question: str
    answer: str


Sampler = Callable[[random.Random, bool], Example]

# One in ten of the operand pairs and lists is held out.
HELD_OUT_ONE_IN = 10


def is_held_out(key: str) -> bool:
    """Whether the operands behind `key` are held out."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def _ask(rng: random.Random, phrasings: Sequence[str], **fields: object) -> str:
    return rng.choice(phrasings).format(**fields)


# --- computed tasks: unseen operands are held out --------------------------------------------

ADD = ("What is {a} + {b}?", "{a} + {b} =", "Add {a} and {b}.", "What is {a} plus {b}?")
SUB = ("What is {a} - {b}?", "{a} - {b} =", "Subtract {b} from {a}.", "What is {a} minus {b}?")
SORT = ("Sort {items}", "Sort these numbers: {items}", "Put in order: {items}")
REVERSE = ("Reverse {items}", "Reverse these letters: {items}", "Write backwards: {items}")
COUNT = ("Count from {a} to {b}.", "List the numbers from {a} to {b}.")
AFTER = ("What number comes after {a}?", "Which number follows {a}?")
BEFORE = ("What number comes before {a}?", "Which number is one less than {a}?")
LARGER = ("Which is larger, {a} or {b}?", "What is the larger of {a} and {b}?")
SMALLER = ("Which is smaller, {a} or {b}?", "What is the smaller of {a} and {b}?")
PARITY = ("Is {a} even or odd?", "Even or odd: {a}?")


def _addition(rng: random.Random, held_out: bool) -> Example:
    """Sums of two-digit numbers that stay below 100."""
    while True:
        a = rng.randint(10, 89)
        b = rng.randint(10, 99 - a)
        # Both orders of a pair fall on the same side of the split.
        if is_held_out(f"add {min(a, b)} {max(a, b)}") == held_out:
            return Example("addition", _ask(rng, ADD, a=a, b=b), str(a + b))


def _subtraction(rng: random.Random, held_out: bool) -> Example:
    """Two-digit differences of two-digit numbers."""
    while True:
        b = rng.randint(10, 89)
        a = rng.randint(b + 10, 99)
        if is_held_out(f"sub {a} {b}") == held_out:
            return Example("subtraction", _ask(rng, SUB, a=a, b=b), str(a - b))


def _sorting(task: str, lengths: tuple[int, int]) -> Sampler:
    """Digits to sort; all orders of one set of numbers fall on the same side of the split.

    Training has pairs too, as an easier step.
    """

    def sample(rng: random.Random, held_out: bool) -> Example:
        while True:
            shortest = lengths[0] if held_out else 2
            numbers = [rng.randrange(10) for _ in range(rng.randint(shortest, lengths[1]))]
            answer = " ".join(map(str, sorted(numbers)))
            if is_held_out(f"sort {answer}") == held_out:
                question = _ask(rng, SORT, items=" ".join(map(str, numbers)))
                return Example(task, question, answer)

    return sample


def _reversal(rng: random.Random, held_out: bool) -> Example:
    while True:
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 5))
        if is_held_out(f"reverse {letters}") == held_out:
            question = _ask(rng, REVERSE, items=" ".join(letters))
            return Example("reversal", question, " ".join(reversed(letters)))


def _counting(rng: random.Random, held_out: bool) -> Example:
    while True:
        first = rng.randint(10, 89)
        last = first + rng.randint(2, 3)
        if is_held_out(f"count {first} {last}") == held_out:
            answer = " ".join(map(str, range(first, last + 1)))
            return Example("counting", _ask(rng, COUNT, a=first, b=last), answer)


def _neighbour(rng: random.Random, held_out: bool) -> Example:
    while True:
        number, step = rng.randint(11, 98), rng.choice((1, -1))
        if is_held_out(f"neighbour {number} {step}") == held_out:
            question = _ask(rng, AFTER if step > 0 else BEFORE, a=number)
            return Example("neighbour", question, str(number + step))


def _comparison(rng: random.Random, held_out: bool) -> Example:
    while True:
        a, b = rng.sample(range(10), 2)
        if is_held_out(f"compare {min(a, b)} {max(a, b)}") == held_out:
            larger = rng.random() < 0.5
            question = _ask(rng, LARGER if larger else SMALLER, a=a, b=b)
            return Example("comparison", question, str(max(a, b) if larger else min(a, b)))


def _parity(rng: random.Random, held_out: bool) -> Example:
    while True:
        number = rng.randint(10, 999)
        if is_held_out(f"parity {number}") == held_out:
            answer = "odd" if number % 2 else "even"
            return Example("parity", _ask(rng, PARITY, a=number), answer)


# --- remembered tasks: a wording that is never used for a subject is held out ----------------

PRODUCT = ("What is {a} * {b}?", "{a} * {b} =", "Multiply {a} by {b}.", "What is {a} times {b}?")
CAPITAL = (
    "What is the capital of {x}?",
    "Name the capital of {x}.",
    "Which city is the capital of {x}?",
    "Tell me the capital of {x}.",
    "Do you know the capital of {x}?",
)
COUNTRY = (
    "{x} is the capital of which country?",
    "Which country has the capital {x}?",
    "Of which country is {x} the capital?",
    "In which country is the capital {x}?",
)
OPPOSITE = (
    "What is the opposite of {x}?",
    "Name the opposite of {x}.",
    "Opposite of {x}?",
    "Which word is the opposite of {x}?",
)
SPELL = (
    "Spell {x}.",
    "How do you spell {x}?",
    "Spell the word {x}.",
    "Please spell the word {x}.",
)
DAY = (
    "What day is {n} after {x}?",
    "Which day comes {n} after {x}?",
    "Name the day {n} after {x}.",
    "It is {x}. What day is it in {n}?",
)
MONTH = (
    "What month comes {x}?",
    "Which month is {x}?",
    "Name the month {x}.",
    "Tell me the month {x}.",
)
SHORT = (
    "What {v} {x}?",
    "Explain {x}.",
    "Define {x}.",
    "In one sentence, what {v} {x}?",
    "Explain {x} in simple words.",
    "Give a short definition of {x}.",
)
PARAGRAPH = (
    "Tell me about {x}",
    "Tell me about {x}.",
    "Tell me more about {x}.",
    "Describe {x}.",
    "Write a paragraph about {x}.",
    "What do you know about {x}?",
)
# The first wordings are those of the guides; they are always trained.
ALWAYS_TRAINED = 2


@dataclass(frozen=True, slots=True)
class Fact:
    """A subject, the words that fill its question, and the answer."""

    subject: str
    fields: dict[str, str]
    answer: str


def _remembered(task: str, phrasings: Sequence[str], facts: Iterable[Fact]) -> Sampler:
    """Samples facts; a checksum picks one wording per subject to hold out."""
    table = tuple(facts)
    spare = len(phrasings) - ALWAYS_TRAINED

    def sample(rng: random.Random, held_out: bool) -> Example:
        fact = rng.choice(table)
        kept = ALWAYS_TRAINED + zlib.crc32(f"{task} {fact.subject}".encode()) % spare
        choices = [kept] if held_out else [i for i in range(len(phrasings)) if i != kept]
        question = phrasings[rng.choice(choices)].format(**fact.fields)
        return Example(task, question[0].upper() + question[1:], fact.answer)

    return sample


def _plain_facts(pairs: Iterable[tuple[str, str]]) -> list[Fact]:
    return [Fact(x, {"x": x}, answer) for x, answer in pairs]


def _topic_facts(*, paragraphs: bool) -> list[Fact]:
    return [
        Fact(
            name,
            # A second name may differ in number: "GPUs are", "a GPU is".
            {"x": name, "v": topic.verb if i == 0 else "are" if name.endswith("s") else "is"},
            topic.paragraph if paragraphs else topic.short,
        )
        for topic in TOPICS
        for i, name in enumerate(topic.names)
    ]


def _product_facts() -> list[Fact]:
    """The times table up to 12 times 12."""
    table = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    return [Fact(f"{a} {b}", {"a": str(a), "b": str(b)}, str(a * b)) for a, b in table]


def _day_facts() -> list[Fact]:
    counts = ("one day", "two days", "three days")
    return [
        Fact(f"{day} {n}", {"x": day, "n": count}, WEEKDAYS[(i + n) % 7])
        for i, day in enumerate(WEEKDAYS)
        for n, count in enumerate(counts, start=1)
    ]


def _month_facts() -> list[Fact]:
    after = [(f"after {m}", MONTHS[(i + 1) % 12]) for i, m in enumerate(MONTHS)]
    before = [(f"before {m}", MONTHS[i - 1]) for i, m in enumerate(MONTHS)]
    return _plain_facts(after + before)


_OPPOSITE_PAIRS = [*OPPOSITES, *((b, a) for a, b in OPPOSITES)]

SAMPLERS: dict[str, Sampler] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "sorting": _sorting("sorting", (3, 4)),
    "comparison": _comparison,
    "counting": _counting,
    "neighbour": _neighbour,
    "parity": _parity,
    "reversal": _reversal,
    "product": _remembered("product", PRODUCT, _product_facts()),
    "capital": _remembered(
        "capital",
        CAPITAL,
        [Fact(x, {"x": x}, f"The capital of {x} is {y}.") for x, y in CAPITALS],
    ),
    "country": _remembered(
        "country",
        COUNTRY,
        [Fact(y, {"x": y}, f"{y} is the capital of {x}.") for x, y in CAPITALS],
    ),
    "opposite": _remembered("opposite", OPPOSITE, _plain_facts(_OPPOSITE_PAIRS)),
    "spelling": _remembered("spelling", SPELL, _plain_facts((w, " ".join(w)) for w in SPELLED)),
    "weekday": _remembered("weekday", DAY, _day_facts()),
    "month": _remembered("month", MONTH, _month_facts()),
    "definition": _remembered("definition", SHORT, _topic_facts(paragraphs=False)),
    "paragraph": _remembered("paragraph", PARAGRAPH, _topic_facts(paragraphs=True)),
}

TASKS: tuple[str, ...] = tuple(SAMPLERS)
GUIDE_QUESTIONS = (
    "Tell me about AI",
    "What is AI?",
    "Explain ML.",
    "Tell me about machine learning",
)


def sample(task: str, rng: random.Random, *, held_out: bool = False) -> Example:
    """Draw one example of `task` from the chosen side of the split."""
    return SAMPLERS[task](rng, held_out)


def held_out_set(task: str, count: int, seed: int = 1) -> list[Example]:
    """Up to `count` different held-out examples of `task`, the same for each seed."""
    rng = random.Random(f"{task} {seed}")
    found: dict[str, Example] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        example = sample(task, rng, held_out=True)
        found.setdefault(example.question, example)
    return list(found.values())


def small_talk(rng: random.Random) -> Example:
    """Draw small talk, such as a greeting; trained, never scored."""
    questions, answer = rng.choice(SMALL_TALK)
    return Example("small_talk", rng.choice(questions), answer)


def loosen(example: Example, rng: random.Random) -> Example:
    """Write the question carelessly: without its question mark, or in lower case."""
    question = example.question
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    if rng.random() < 0.05:
        question = question.lower()
    return Example(example.task, question, example.answer)


def tokenizer_texts(seed: int = 0) -> list[str]:
    """Texts in proportions that make a good small vocabulary: mostly prose."""
    rng = random.Random(seed)
    prose = [text for topic in TOPICS for text in (topic.short, topic.paragraph)]
    asked = [sample(task, rng) for task in TASKS for _ in range(400)]
    spoken = [f"{answer} {' '.join(questions)}" for questions, answer in SMALL_TALK]
    return prose * 6 + spoken * 6 + [f"{e.question}\n\n{e.answer}" for e in asked]
