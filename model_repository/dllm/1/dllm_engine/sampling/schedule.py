"""Schedules: the number of positions that each step commits."""

from __future__ import annotations

import numpy as np
import torch

from dllm_engine.ops.transfer import Array


def linear_count(num_masks: Array, steps: Array, step: Array) -> Array:
    """Positions that step `step` of `steps` commits in a block that began with `num_masks`.

    Equal shares; the first steps take the remainder (LLaDA, `get_num_transfer_tokens`).
    All int64 [R].
    """
    steps = np.maximum(steps, 1)  # of a block that a form has decided, none
    return num_masks // steps + (step < num_masks % steps)


def dream_chances(steps: int, eps: float = 1e-3) -> Array:
    """The share 1 − s/t of the masked positions that each of `steps` steps decodes.

    t and s are neighbours in linspace(1, eps, steps + 1), and the last step decodes everything
    (Dream, generation_utils.py). float32 [steps], so that counts round as in the reference.
    """
    times = torch.linspace(1, eps, steps + 1)  # numpy's linspace rounds differently
    chances = 1 - times[1:] / times[:-1]
    chances[-1] = 1.0
    return chances.numpy()


def dream_count(num_masked: Array, chance: Array) -> Array:
    """⌊masked positions · chance⌋, computed in float32 like the reference: int64 [R]."""
    return (num_masked.astype(np.float32) * chance).astype(np.int64)
