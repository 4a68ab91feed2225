"""The numbers of every running request, as columns of three tables on the host.

A step reads those of its requests with one operation per table and writes back what has changed
with one more, however many requests there are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dllm_engine.decoding import ENTROPY_SCORES, Rule, decoding_of, score_of
from dllm_engine.memory import CachePolicy
from dllm_engine.ops import Array
from dllm_engine.request import Prompt
from dllm_engine.sampling import needs_full_logits
from dllm_engine.sampling_params import SamplingParams


class SlotState(NamedTuple):
    """The numbers of R requests; [R] each."""

    #: int64; where they stand in the tables.
    slots: Array
    # int64. What a step changes comes first.
    step: Array
    #: Schedule of the active block: steps run, its share of the steps, masks when it began.
    block_step: Array
    block_steps: Array
    block_masks: Array
    #: Place of its first step in the schedule of the whole canvas.
    block_first_step: Array
    #: Steps run in it.
    block_age: Array
    block_start: Array
    block_end: Array
    # The rest stays as it is while a request runs.
    length: Array
    #: The positions to be filled: first and end.
    canvas_start: Array
    canvas_end: Array
    block_length: Array
    steps: Array
    top_k: Array
    seed: Array
    score: Array
    rule: Array
    cache: Array
    delay_steps: Array
    refresh_interval: Array
    pool_kernel: Array
    # float64.
    temperature: Array
    cfg_scale: Array
    #: The rule's two parameters.
    threshold: Array
    second_threshold: Array
    top_p: Array
    alg_temp: Array
    retention_ratio: Array
    # bool.
    #: It samples as Dream does.
    dream_statistics: Array
    #: Some of its schedule's steps commit nothing.
    skips: Array
    #: An end-of-text token ends it.
    honours_eos: Array
    logits_eos_inf: Array
    confidence_eos_eot_inf: Array
    uses_credit: Array
    #: Its rule looks at entropies or margins.
    needs_entropy: Array
    #: Its rows are needed whole (see `sampling.needs_full_logits`).
    needs_full_logits: Array
    # The tables: [columns, R].
    ints: Array
    floats: Array
    bools: Array

    @classmethod
    def of(cls, slots: Array, ints: Array, floats: Array, bools: Array) -> SlotState:
        """Name the columns of the tables."""
        return cls._make((slots, *ints, *floats, *bools, ints, floats, bools))

    def take(self, index: Array) -> SlotState:
        """Those of some of the R, for an int64 index."""
        return SlotState.of(
            self.slots[index], self.ints[:, index], self.floats[:, index], self.bools[:, index]
        )


_FIELDS = SlotState._fields
_INTS = _FIELDS[_FIELDS.index("step") : _FIELDS.index("temperature")]
_FLOATS = _FIELDS[_FIELDS.index("temperature") : _FIELDS.index("dream_statistics")]
_BOOLS = _FIELDS[_FIELDS.index("dream_statistics") : _FIELDS.index("ints")]
#: Columns that a step changes.
CHANGING = _FIELDS[_FIELDS.index("step") : _FIELDS.index("length")]


class SlotTable:
    """The numbers of all slots."""

    def __init__(self, num_slots: int) -> None:
        self._tables = (
            (_INTS, np.zeros((len(_INTS), num_slots), np.int64)),
            (_FLOATS, np.zeros((len(_FLOATS), num_slots), np.float64)),
            (_BOOLS, np.zeros((len(_BOOLS), num_slots), np.bool_)),
        )

    @property
    def num_bytes(self) -> int:
        """Memory of all of it."""
        return sum(table.nbytes for _, table in self._tables)

    def read(self, slots: Array) -> SlotState:
        """Copies of what is known of int64 [R] slots."""
        return SlotState.of(slots, *(table[:, slots] for _, table in self._tables))

    def fill(self, slot: int, prompt: Prompt, params: SamplingParams) -> None:
        """Everything of one slot, before its first block is opened; `params` must be resolved."""
        values = _numbers(prompt, params)
        for names, table in self._tables:
            # What the active block is stays at 0 where it is not given.
            table[:, slot] = [
                values.get(name, 0) if name in CHANGING else values[name] for name in names
            ]

    def change(self, state: SlotState) -> None:
        """Write the columns that a step changes; what `state` says of others is not looked at."""
        _, ints = self._tables[0]
        ints[: len(CHANGING), state.slots] = state[1 : 1 + len(CHANGING)]


def _numbers(prompt: Prompt, params: SamplingParams) -> dict[str, float | bool]:
    """The columns of a request, before its first block is opened."""
    assert params.block_length is not None
    assert params.steps is not None
    assert params.seed is not None
    assert params.cache is not None
    assert params.retention_ratio is not None
    assert params.pool_kernel is not None
    assert params.delay_steps is not None
    assert params.refresh_interval is not None
    start = len(prompt.ids)
    decoding, score = decoding_of(params), score_of(params)
    bounds = decoding.bounds(params)
    dream_statistics = params.alg is not None
    top_p = 1.0 if params.top_p is None else params.top_p
    filtered = top_p < 1 or bool(params.top_k)
    # In a gap, what stands behind it goes on whatever is decoded before.
    is_gap = bool(prompt.suffix_ids or prompt.canvas_ids)
    return {
        "block_start": start,
        "block_end": start,
        "length": prompt.num_tokens + params.gen_length,
        "canvas_start": start,
        "canvas_end": start + params.gen_length,
        "block_length": params.block_length,
        "steps": params.steps,
        "top_k": params.top_k or 0,
        "seed": params.seed,
        "score": int(score),
        "rule": int(decoding.rule),
        "cache": int(CachePolicy[params.cache.upper()]),
        "delay_steps": params.delay_steps,
        "refresh_interval": params.refresh_interval,
        "pool_kernel": params.pool_kernel,
        "temperature": params.temperature,
        "cfg_scale": params.cfg_scale,
        "threshold": bounds[0],
        "second_threshold": bounds[1],
        "top_p": top_p,
        "alg_temp": params.alg_temp,
        "retention_ratio": params.retention_ratio,
        "dream_statistics": dream_statistics,
        "skips": dream_statistics and decoding.rule is Rule.COUNT,
        "honours_eos": not (params.ignore_eos or is_gap),
        "logits_eos_inf": params.logits_eos_inf,
        "confidence_eos_eot_inf": params.confidence_eos_eot_inf,
        "uses_credit": params.credit,
        "needs_entropy": score in ENTROPY_SCORES or decoding.rule is Rule.ENTROPY_BOUND,
        "needs_full_logits": needs_full_logits(params.temperature > 0, filtered, dream_statistics),
    }
