"""Log-probabilities of given tokens: what to read for a set of candidate texts, or for one text.

A reading is a request that runs the model once at its masks and decodes nothing (`Prompt.reads`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from dllm_engine.request import Prompt

T = TypeVar("T")
#: What one prompt read: [masks, K] float32 (`CanvasUpdate.read`).
Read = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Readings(Generic[T]):
    """Prompts that read, and what to make from what they read."""

    prompts: list[Prompt]
    #: Takes what each prompt read, in the order of the prompts.
    answer: Callable[[Sequence[Read]], T]


def joined(parts: Sequence[Readings[T]]) -> Readings[list[T]]:
    """Several readings as one, whose answer is the list of theirs."""

    def answer(reads: Sequence[Read]) -> list[T]:
        answers, start = [], 0
        for part in parts:
            end = start + len(part.prompts)
            answers.append(part.answer(reads[start:end]))
            start = end
        return answers

    return Readings([prompt for part in parts for prompt in part.prompts], answer)


def read_tokens(context: list[int], tokens: Sequence[int], mask: int) -> Readings[list[float]]:
    """Read the log-probability of each token as the one behind `context`."""
    reads = np.array([tokens], np.int64)
    return Readings(
        [Prompt(context, canvas_ids=[mask], reads=reads)], lambda read: read[0][0].tolist()
    )


def read_candidates(
    context: list[int], texts: Sequence[Sequence[int]], mask: int, *, blockwise: bool
) -> Readings[list[float]]:
    """Read the mean log-probability of the tokens of each candidate text behind `context`.

    What all texts begin with is given, and does not count. A model that sees the whole canvas reads
    all texts at the masks of one canvas, as long as the longest. A block-wise model reads each
    token behind those before it, at one mask; texts share what they begin with.

    Args:
        texts: token ids; none may be empty.
    """
    same = _common_length(texts)
    context, texts = [*context, *texts[0][:same]], [list(text[same:]) for text in texts]
    if blockwise:
        return _read_tree(context, texts, mask)
    longest = max(map(len, texts))
    reads = np.full((longest, len(texts)), -1, np.int64)
    for column, text in enumerate(texts):
        reads[: len(text), column] = text

    def answer(read: Sequence[Read]) -> list[float]:
        found = read[0].astype(np.float64)
        return [float(found[: len(text), i].mean()) for i, text in enumerate(texts)]

    return Readings([Prompt(context, canvas_ids=[mask] * longest, reads=reads)], answer)


def _common_length(texts: Sequence[Sequence[int]]) -> int:
    """Tokens that all texts begin with; each keeps one token at least."""
    shortest = min(map(len, texts)) - 1
    return next(
        (i for i in range(shortest) if len({text[i] for text in texts}) > 1), max(0, shortest)
    )


def _read_tree(
    context: list[int], texts: Sequence[Sequence[int]], mask: int
) -> Readings[list[float]]:
    """Read each token of each text behind those before it, each beginning once."""
    after: dict[tuple[int, ...], list[int]] = {}
    for text in texts:
        for i, token in enumerate(text):
            tokens = after.setdefault(tuple(text[:i]), [])
            if token not in tokens:
                tokens.append(token)
    prompts = [
        Prompt([*context, *begin], canvas_ids=[mask], reads=np.array([tokens], np.int64))
        for begin, tokens in after.items()
    ]

    def answer(reads: Sequence[Read]) -> list[float]:
        found = {
            (begin, token): float(value)
            for (begin, tokens), read in zip(after.items(), reads, strict=True)
            for token, value in zip(tokens, read[0], strict=True)
        }
        return [
            math.fsum(found[tuple(text[:i]), token] for i, token in enumerate(text)) / len(text)
            for text in texts
        ]

    return Readings(prompts, answer)


def read_left_to_right(context: list[int], text: Sequence[int], mask: int) -> Readings[float]:
    """Read log p(text | context) as a sum over its tokens, each behind those before it."""
    prompts = [
        Prompt([*context, *text[:i]], canvas_ids=[mask], reads=np.array([[token]], np.int64))
        for i, token in enumerate(text)
    ]
    return Readings(prompts, lambda reads: math.fsum(float(read[0, 0]) for read in reads))


def read_monte_carlo(
    context: list[int], text: Sequence[int], mask: int, *, mc_num: int, seed: int
) -> Readings[float]:
    """Estimate a bound of log p(text | context) from random masks (LLaDA, get_log_likelihood.py).

    Each of `mc_num` draws masks k of the text's n tokens and counts the log-probabilities of the
    masked ones n / k times. The numbers k are spread evenly over 1 to n from a random first one,
    which lowers the variance. The draws depend on the seed and on n alone.
    """
    length, draws = len(text), np.random.default_rng(seed)
    first = int(draws.integers(1, length + 1))
    prompts, weights = [], []
    for i in range(mc_num):
        count = (round(first + i * length / mc_num) - 1) % length + 1
        hidden = sorted(draws.permutation(length)[:count].tolist())
        canvas = list(text)
        for place in hidden:
            canvas[place] = mask
        reads = np.array([[text[place]] for place in hidden], np.int64)
        prompts.append(Prompt(context, canvas_ids=canvas, reads=reads))
        weights.append(length / count)

    def answer(reads: Sequence[Read]) -> float:
        sums = (w * float(r.sum(dtype=np.float64)) for w, r in zip(weights, reads, strict=True))
        return math.fsum(sums) / mc_num

    return Readings(prompts, answer)
