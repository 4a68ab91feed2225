"""The decoding rules written out plainly for one block: lists in, sets of positions out."""

from __future__ import annotations

import itertools


def ranked(score: list[float], masked: list[bool]) -> list[int]:
    """Masked positions, best first, ties by position."""
    return sorted((i for i, open_ in enumerate(masked) if open_), key=lambda i: (-score[i], i))


def fixed_count(score: list[float], masked: list[bool], count: int) -> set[int]:
    """The `count` best positions."""
    return set(ranked(score, masked)[:count])


def threshold(confidence: list[float], masked: list[bool], tau: float) -> set[int]:
    """All positions at or above `tau`, and the best."""
    order = ranked(confidence, masked)
    return set(order[:1]) | {i for i in order if confidence[i] >= tau}


def dynamic(confidence: list[float], masked: list[bool], tau: float, count: int) -> set[int]:
    """All positions above `tau` if they are at least `count`, else the `count` best."""
    order = ranked(confidence, masked)
    above = {i for i in order if confidence[i] > tau}
    return above if len(above) >= min(count, len(order)) else set(order[:count])


def factor(confidence: list[float], masked: list[bool], f: float) -> set[int]:
    """The longest run of best positions with c_n at least 1 − f / (n + 1)."""
    order = ranked(confidence, masked)
    chosen = set(order[:1])
    for n, i in enumerate(order[1:], start=2):
        if confidence[i] < 1 - f / (n + 1):
            break
        chosen.add(i)
    return chosen


def entropy_bound(entropy: list[float], masked: list[bool], gamma: float) -> set[int]:
    """Positions by rising entropy, while the entropies before sum to at most `gamma`."""
    chosen, total = set(), 0.0
    for i in ranked([-h for h in entropy], masked):
        if total > gamma:
            break
        chosen.add(i)
        total += entropy[i]
    return chosen


def hierarchical(confidence: list[float], masked: list[bool], low: float, tau: float) -> set[int]:
    """The best of each run of masks above `low`, all above `tau`, and the best of all."""
    order = ranked(confidence, masked)
    chosen = set(order[:1]) | {i for i in order if confidence[i] > tau}
    for open_, run in itertools.groupby(range(len(masked)), key=lambda i: masked[i]):
        if open_:
            best = max(run, key=lambda i: (confidence[i], -i))
            if confidence[best] > low:
                chosen.add(best)
    return chosen


def local_leap(
    confidence: list[float],
    masked: list[bool],
    committed: list[float],
    count: int,
    anchor: float,
    neighbour: float,
    score: list[float] | None = None,
) -> set[int]:
    """The `count` best positions, and fairly sure ones within four of every sure position.

    `score` ranks the best; default: the confidence.
    """
    chosen = fixed_count(confidence if score is None else score, masked, count)
    anchors = {i for i in chosen if confidence[i] >= anchor}
    anchors |= {i for i, open_ in enumerate(masked) if not open_ and committed[i] >= anchor}
    for i, open_ in enumerate(masked):
        near = any(abs(i - a) <= 4 for a in anchors)
        if open_ and near and confidence[i] >= neighbour:
            chosen.add(i)
    return chosen
