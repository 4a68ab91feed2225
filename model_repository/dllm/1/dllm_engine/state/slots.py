"""The numbers of every running request, as columns of three tables on the host.

A step reads the numbers of its requests with one operation per table, however many requests there
are.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple, get_type_hints

import numpy as np

from dllm_engine.decoding import ENTROPY_SCORES, Rule, decoding_of, score_of
from dllm_engine.memory.cache_policy import CachePolicy
from dllm_engine.models.base import BlockAttention
from dllm_engine.ops.transfer import Array
from dllm_engine.request import Prompt
from dllm_engine.sampling.rows import needs_full_logits
from dllm_engine.sampling_params import SamplingParams

#: Columns of each number type: [R].
Int = Annotated[Array, np.int64]
Float = Annotated[Array, np.float64]
Bool = Annotated[Array, np.bool_]


class SlotState(NamedTuple):
    """The numbers of R requests, a column each."""

    #: [R] int64; which slots they are in.
    slots: Array
    step: Int
    #: Steps run; `step` also counts those that Dream's schedule leaves empty, and no prefill.
    steps_run: Int
    #: Schedule of the active block: steps run, its share of the steps, masks when it began.
    block_step: Int
    block_steps: Int
    block_masks: Int
    #: The block's first step in the schedule of the whole canvas.
    block_first_step: Int
    #: Steps run in the block.
    block_age: Int
    block_start: Int
    block_end: Int
    #: The next step: whether the whole sequence goes through the model, and whether its keys and
    #: values are then stored.
    refresh: Bool
    store: Bool
    #: First committed end-of-text token; the canvas's end if there is none.
    first_end: Int
    #: The block's window (see `cache_policy`); of a block-wise model the block of attention that
    #: the active block is part of. First position and end.
    window_start: Int
    window_end: Int
    #: First position and number of the rows of one sequence that go through the model; of a
    #: partial window all that it is part of begins there.
    first_row: Int
    num_rows: Int
    #: Stored rows: those that `sparse` keeps outside the window, and all that a Reuse attends to.
    keep: Int
    kv_lens: Int
    #: Positions from the left whose stored keys and values are final; 0 unless block-wise.
    final: Int
    #: The next step decodes masked positions of the active block; it does not while it prefills.
    decodes: Bool
    #: Of these the first alone, which the block before predicts (`BlockAttention`).
    opens: Bool
    #: It checks a drafted block, left to right (`Rule.SPECULATIVE`); else it drafts one.
    verifies: Bool
    length: Int
    #: The positions to be filled: first and end. Whole blocks, of a block-wise model: what lies
    #: behind `answer_end` is decoded and never shown.
    canvas_start: Int
    canvas_end: Int
    answer_end: Int
    #: Positions of which a step decodes some; blocks of attention, and where they are counted from.
    block_length: Int
    window_length: Int
    origin: Int
    #: Steps of each block's schedule; 0: its share of the canvas's steps.
    steps_per_block: Int
    steps: Int
    top_k: Int
    seed: Int
    score: Int
    rule: Int
    cache: Int
    delay_steps: Int
    refresh_interval: Int
    pool_kernel: Int
    #: How many alternatives to list beside each token's log-probability; −1: neither.
    logprobs: Int
    temperature: Float
    cfg_scale: Float
    #: The rule's two parameters.
    threshold: Float
    second_threshold: Float
    top_p: Float
    alg_temp: Float
    retention_ratio: Float
    #: It samples as Dream does.
    dream_statistics: Bool
    #: Some steps of its schedule commit nothing.
    has_empty_steps: Bool
    #: An end-of-text token ends it.
    honours_eos: Bool
    logits_eos_inf: Bool
    confidence_eos_eot_inf: Bool
    uses_credit: Bool
    #: Its rule needs entropies or margins.
    needs_entropy: Bool
    #: It needs whole rows of logits (see `sampling.needs_full_logits`).
    needs_full_logits: Bool
    #: All columns of a type, [columns, R].
    ints: Array
    floats: Array
    bools: Array

    @classmethod
    def of(cls, slots: Array, ints: Array, floats: Array, bools: Array) -> SlotState:
        """Name the columns of the three tables."""
        columns = dict(zip(_NAMES, (*ints, *floats, *bools), strict=True))
        return cls(slots=slots, **columns, ints=ints, floats=floats, bools=bools)

    def take(self, index: Array) -> SlotState:
        """The state of the requests at int64 `index`."""
        return SlotState.of(
            self.slots[index], self.ints[:, index], self.floats[:, index], self.bools[:, index]
        )

    @property
    def speculates(self) -> Array:
        """bool; it drafts a block in one step, and checks it in the next."""
        speculates: Array = self.rule == int(Rule.SPECULATIVE)
        return speculates

    @property
    def selects(self) -> Array:
        """bool; the next step stores a selection of its keys and values."""
        selects: Array = self.store & (self.cache == int(CachePolicy.SPARSE))
        return selects

    @property
    def partial(self) -> Array:
        """bool; only some positions of the window go through the model (`delayed_rows`)."""
        partial: Array = ~self.refresh & (self.cache == int(CachePolicy.DELAYED))
        return partial


def _columns(kind: object) -> tuple[str, ...]:
    hints = get_type_hints(SlotState, include_extras=True)
    return tuple(name for name, hint in hints.items() if hint == kind)


_KINDS = (Int, Float, Bool)
_NAMES = tuple(name for kind in _KINDS for name in _columns(kind))
#: Columns that a step changes; those from `length` on stay as they are while a request runs.
CHANGING = SlotState._fields[1 : SlotState._fields.index("length")]


class SlotTable:
    """The numbers of all slots."""

    def __init__(self, num_slots: int) -> None:
        self._tables = [
            np.zeros((len(_columns(kind)), num_slots), kind.__metadata__[0])  # type: ignore[attr-defined]
            for kind in _KINDS
        ]
        rows = (row for table in self._tables for row in table)
        #: By name a view of each column: [slots].
        self._columns = dict(zip(_NAMES, rows, strict=True))

    @property
    def num_bytes(self) -> int:
        """Memory of the three tables."""
        return sum(table.nbytes for table in self._tables)

    def read(self, slots: Array) -> SlotState:
        """Copy the numbers of int64 [R] slots."""
        return SlotState.of(slots, *(table[:, slots] for table in self._tables))

    def fill(
        self, slot: int, prompt: Prompt, params: SamplingParams, blocks: BlockAttention | None
    ) -> None:
        """Set all numbers of one slot, with no block open yet; `params` must be resolved."""
        values = _numbers(prompt, params) | _lengths(prompt, params, blocks)
        for name, column in self._columns.items():
            column[slot] = values.get(name, 0) if name in CHANGING else values[name]

    def change(self, state: SlotState) -> None:
        """Write the `CHANGING` columns of `state`."""
        for name in CHANGING:
            self._columns[name][state.slots] = getattr(state, name)


def _numbers(prompt: Prompt, params: SamplingParams) -> dict[str, float | bool]:
    """Compute the columns of a request that no step changes, besides its lengths."""
    assert params.cache is not None
    same = {name: value for name, value in vars(params).items() if name in _NAMES}
    decoding, score = decoding_of(params), score_of(params)
    bounds = decoding.bounds(params)
    dream_statistics = params.alg is not None
    top_p = 1.0 if params.top_p is None else params.top_p
    filtered = top_p < 1 or bool(params.top_k)
    # Infilling goes on after an end-of-text token, since text follows the gap.
    is_gap = bool(prompt.suffix_ids or prompt.canvas_ids)
    return same | {
        "top_k": params.top_k or 0,
        "logprobs": -1 if params.logprobs is None else params.logprobs,
        "score": int(score),
        "rule": int(decoding.rule),
        "cache": int(CachePolicy[params.cache.upper()]),
        "threshold": bounds[0],
        "second_threshold": bounds[1],
        "top_p": top_p,
        "dream_statistics": dream_statistics,
        "has_empty_steps": dream_statistics and decoding.rule is Rule.COUNT,
        "honours_eos": not (params.ignore_eos or is_gap),
        "uses_credit": params.credit,
        "needs_entropy": score in ENTROPY_SCORES or decoding.rule is Rule.ENTROPY_BOUND,
        "needs_full_logits": needs_full_logits(params.temperature > 0, filtered, dream_statistics),
    }


def _lengths(
    prompt: Prompt, params: SamplingParams, blocks: BlockAttention | None
) -> dict[str, float | bool]:
    """Compute where a request's canvas and blocks lie."""
    assert params.block_length is not None
    assert params.steps is not None
    start, size = len(prompt.ids), params.block_length
    answer_end = canvas_end = start + params.gen_length
    part, steps, origin = size, 0, start
    if blocks is not None:
        part = min(blocks.sub_block_length or size, size)
        steps = max(1, min(part, params.steps * part // params.gen_length))
        if blocks.origin == "absolute":
            origin, canvas_end = 0, -(-answer_end // size) * size
    return {
        "block_start": start,
        "block_end": start,
        "first_end": canvas_end,
        "length": canvas_end + len(prompt.suffix_ids),
        "canvas_start": start,
        "canvas_end": canvas_end,
        "answer_end": answer_end,
        "block_length": part,
        "window_length": size,
        "origin": origin,
        "steps_per_block": steps,
    }
