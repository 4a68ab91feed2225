"""Defines the cache policies: phases, rows and sizes.

A step of a request is a **Refresh**, its whole sequence goes through the model, or a **Reuse**,
only its active rows do, and attend to what is stored besides their own fresh keys and values.

The *window* is the active block; of a shifted model also the position before it, whose hidden
state predicts the block's first token. What a Reuse computes:

- `prefix` (Fast-dLLM, 3.2): the window and everything behind it;
- `dual` (Fast-dLLM, 3.2): the window;
- `sparse` (Sparse-dLLM; dLLM-Serve): the window; of the positions outside it each KV head keeps
  only its best, and at least `LEAST_KEPT` (`ops.selection`);
- `delayed` (dKV-Cache, 3.2): of the window what is masked, what was committed by the step before,
  and, shifted, what predicts a masked position. A position is thus stored with its final token one
  step after that was committed.

`block` is the policy of block-wise models, whose stored keys and values are exact; it has steps of
its own. What each policy computes, sees and stores is in `state.scope`.

Fresh keys and values always replace the stored ones of their positions.
"""

from __future__ import annotations

import enum

import numpy as np

from dllm_engine.ops.transfer import Array

#: Positions outside the window that `sparse` keeps at least, whatever the ratio. In a short
#: sequence a ratio keeps too few for correct answers (docs/decisions/012) and saves almost nothing:
#: a block with this many positions takes two pages of the default size. Sparse-dLLM and dLLM-Serve
#: keep at least one.
LEAST_KEPT = 32


class CachePolicy(enum.IntEnum):
    """Keys and values kept between steps; the names of `SamplingParams.cache`."""

    NONE = 0
    PREFIX = 1
    DUAL = 2
    SPARSE = 3
    DELAYED = 4
    BLOCK = 5


def phase_of(policy: Array, age: Array, delay: Array, interval: Array) -> tuple[Array, Array]:
    """Determine the phase of the step that is `age` steps into its block; all int64 [R].

    The first `delay` steps of a block only look at everything; the next one also stores. From
    there on every `interval`-th step stores anew, or none where it is 0.

    Returns:
        Both [R] bool: whether it is a Refresh, and whether its keys and values are stored.
    """
    since = age - delay
    again = (interval > 0) & (since % np.maximum(interval, 1) == 0)
    cached = policy != int(CachePolicy.NONE)
    refresh = ~cached | (since <= 0) | again
    return refresh, cached & refresh & (since >= 0)


def delayed_rows(masked: Array, last_committed: Array, *, shifted: bool) -> Array:
    """Determine what `delayed` computes of a window: bool [R, width], as the arguments are.

    Args:
        masked: still to be decoded.
        last_committed: committed by the step before.
        shifted: whether a hidden state predicts the next position.
    """
    found = masked | last_committed
    if shifted:
        found[:, :-1] |= masked[:, 1:]
    return found


def kept_rows(num_candidates: Array | int, retention_ratio: Array | float) -> Array:
    """How many of `num_candidates` positions a head keeps under `sparse`: int64."""
    kept = (retention_ratio * np.asarray(num_candidates)).astype(np.int64)
    return np.minimum(num_candidates, np.maximum(kept, LEAST_KEPT))


def reserved_rows(
    policy: CachePolicy, length: int, widest_window: int, retention_ratio: float
) -> int:
    """Count the rows of keys and values that a sequence of `length` tokens holds at most."""
    if policy is CachePolicy.NONE:
        return 0
    if policy is not CachePolicy.SPARSE:
        return length
    return int(kept_rows(length - widest_window, retention_ratio)) + widest_window
