"""Scores: the likelihood of given continuations, as `LLM.score` and the server read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dllm_engine.errors import InvalidRequest
from dllm_engine.readings import Readings, joined, read_left_to_right, read_monte_carlo
from dllm_engine.tokenizer import Tokenizer

#: Most pairs of a call, most draws of a pair, and most forward passes that a call may ask for.
MAX_PAIRS, MAX_DRAWS, MAX_PASSES = 1000, 1024, 4096
DEFAULT_DRAWS = 128
MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Score:
    """The likelihood of one continuation."""

    #: log p(continuation | context) in nats: exact, or an estimate of a lower bound.
    logprob: float
    #: Tokens of the continuation.
    num_tokens: int
    #: `left_to_right` (exact) or `monte_carlo`.
    method: str


def read_scores(
    pairs: Sequence[Sequence[str]],
    tokenizer: Tokenizer | None,
    mask: int,
    *,
    blockwise: bool,
    mc_num: int | None = None,
    seed: int = 0,
) -> Readings[list[Score]]:
    """Plan the readings of (context, continuation) pairs.

    Args:
        mc_num: draws of the Monte Carlo estimate; None: `DEFAULT_DRAWS`. A block-wise model reads
            left to right, exactly, and takes none.
        seed: of the draws; the same for each pair.

    Raises:
        InvalidRequest: names the field and the limit.
    """
    if tokenizer is None:
        raise InvalidRequest("pairs", "this checkpoint has no tokenizer")
    _check(pairs, mc_num, seed, blockwise=blockwise)
    draws = mc_num or DEFAULT_DRAWS
    parts: list[Readings[Score]] = []
    passes = 0
    for i, (context, continuation) in enumerate(pairs):
        given, text = encode_pair(tokenizer, context, continuation)
        if not text:
            raise InvalidRequest("pairs", f"pair {i}: the continuation makes no token")
        passes += len(text) if blockwise else draws
        if passes > MAX_PASSES:
            problem = f"need more than {MAX_PASSES} forward passes; send fewer, or a smaller mc_num"
            raise InvalidRequest("pairs", problem)
        if blockwise:
            found, method = read_left_to_right(given, text, mask), "left_to_right"
        else:
            found = read_monte_carlo(given, text, mask, mc_num=draws, seed=seed)
            method = "monte_carlo"
        parts.append(_scored(found, len(text), method))
    return joined(parts)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation.

    As lm-evaluation-harness does: spaces at the end of the context belong to the continuation, and
    the two are encoded together.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode_text(context + continuation)
    given = tokenizer.encode_text(stripped) if stripped else []
    return given, whole[len(given) :]


def score_question(value: Any) -> dict[str, Any]:
    """Check the JSON object of a score request: the arguments of `read_scores`.

    Raises:
        InvalidRequest: names the field.
    """
    if not isinstance(value, Mapping) or "pairs" not in value:
        raise InvalidRequest("JSON", 'must be an object with "pairs"')
    if unknown := set(value) - {"pairs", "mc_num", "seed"}:
        raise InvalidRequest("JSON", f"has no field {min(map(str, unknown))}")
    return {name: value[name] for name in value if value[name] is not None}


def _check(pairs: Any, mc_num: Any, seed: Any, *, blockwise: bool) -> None:
    if not isinstance(pairs, list | tuple) or not 1 <= len(pairs) <= MAX_PAIRS:
        got = len(pairs) if isinstance(pairs, list | tuple) else type(pairs).__name__
        raise InvalidRequest("pairs", f"must be a list of 1 to {MAX_PAIRS} pairs; got {got}")
    for i, pair in enumerate(pairs):
        fits = isinstance(pair, list | tuple) and len(pair) == 2
        if not fits or not all(isinstance(text, str) for text in pair):
            raise InvalidRequest("pairs", f"pair {i} must be two texts: context and continuation")
        if not pair[1]:
            raise InvalidRequest("pairs", f"pair {i}: the continuation must not be empty")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise InvalidRequest("seed", f"must be 0 to {MAX_SEED}; got {seed!r}")
    if mc_num is None:
        return
    if blockwise:
        raise InvalidRequest("mc_num", "a block-wise model reads left to right, without draws")
    if type(mc_num) is not int or not 1 <= mc_num <= MAX_DRAWS:
        raise InvalidRequest("mc_num", f"must be 1 to {MAX_DRAWS}; got {mc_num!r}")


def _scored(found: Readings[float], num_tokens: int, method: str) -> Readings[Score]:
    return Readings(found.prompts, lambda reads: Score(found.answer(reads), num_tokens, method))
