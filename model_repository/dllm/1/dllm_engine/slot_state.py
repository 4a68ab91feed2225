"""The numbers of every running request, as columns of three tables.

A step reads all of some slots' numbers with one operation per table, and writes back those that it
changes with one more, however many columns there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ops import upload


class SlotState(NamedTuple):
    """The numbers of R slots; [R] each. Those of a whole `SlotTable` are views into it."""

    #: int64; the slots themselves.
    slots: Tensor
    # int64. What a step changes comes first.
    step: Tensor
    #: Schedule of the active block: steps run, its share of the steps, masks when it began.
    block_step: Tensor
    block_steps: Tensor
    block_masks: Tensor
    #: Place of its first step in the schedule of the whole canvas.
    block_first_step: Tensor
    #: Steps run in it.
    block_age: Tensor
    block_start: Tensor
    block_end: Tensor
    # The rest stays as it is while a request runs.
    length: Tensor
    prompt_len: Tensor
    canvas_end: Tensor
    block_length: Tensor
    steps: Tensor
    top_k: Tensor
    seed: Tensor
    score: Tensor
    rule: Tensor
    cache: Tensor
    delay_steps: Tensor
    refresh_interval: Tensor
    pool_kernel: Tensor
    # float64.
    temperature: Tensor
    cfg_scale: Tensor
    bound: Tensor
    second_bound: Tensor
    top_p: Tensor
    alg_temp: Tensor
    retention_ratio: Tensor
    # bool.
    tempered: Tensor
    honours_eos: Tensor
    no_eos: Tensor
    late_eos: Tensor
    # The tables: [columns, R].
    ints: Tensor
    floats: Tensor
    bools: Tensor

    @classmethod
    def of(cls, slots: Tensor, ints: Tensor, floats: Tensor, bools: Tensor) -> SlotState:
        """Name the columns of the tables."""
        columns = (*ints.unbind(0), *floats.unbind(0), *bools.unbind(0))
        return cls._make((slots, *columns, ints, floats, bools))

    def take(self, index: Tensor) -> SlotState:
        """Those of some of the R, for an int64 index."""
        return SlotState.of(
            self.slots.index_select(0, index),
            self.ints.index_select(1, index),
            self.floats.index_select(1, index),
            self.bools.index_select(1, index),
        )

    @property
    def changing(self) -> Tensor:
        """The columns that a step changes, [len(CHANGING), R]."""
        return torch.stack(self[1 : 1 + len(CHANGING)])

    def changed(self, columns: Tensor) -> SlotState:
        """With these for all that a step changes; the tables stay as they were."""
        return self._replace(**dict(zip(CHANGING, columns.unbind(0), strict=True)))


_FIELDS = SlotState._fields
_INTS = _FIELDS[_FIELDS.index("step") : _FIELDS.index("temperature")]
_FLOATS = _FIELDS[_FIELDS.index("temperature") : _FIELDS.index("tempered")]
_BOOLS = _FIELDS[_FIELDS.index("tempered") : _FIELDS.index("ints")]
#: Columns that a step changes.
CHANGING = _FIELDS[_FIELDS.index("step") : _FIELDS.index("length")]


class SlotTable:
    """The numbers of all slots, on one device."""

    def __init__(self, num_slots: int, device: str) -> None:
        def columns(names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(len(names), num_slots, dtype=dtype, device=device)

        slots = torch.arange(num_slots, device=device)
        self._all = SlotState.of(
            slots,
            columns(_INTS, torch.int64),
            columns(_FLOATS, torch.float64),
            columns(_BOOLS, torch.bool),
        )

    @property
    def num_bytes(self) -> int:
        """Memory of all of it."""
        every = self._all
        return sum(table.nbytes for table in (every.slots, every.ints, every.floats, every.bools))

    def read(self, slots: Tensor) -> SlotState:
        """What is known of int64 [R] slots."""
        return self._all.take(slots)

    def fill(self, slot: int, values: dict[str, float | bool]) -> None:
        """Everything of one slot; what the active block is stays at 0 where it is not given."""
        for names, table in (
            (_INTS, self._all.ints),
            (_FLOATS, self._all.floats),
            (_BOOLS, self._all.bools),
        ):
            row = [values.get(name, 0) if name in CHANGING else values[name] for name in names]
            table[:, slot] = upload(torch.tensor(row, dtype=table.dtype), table.device)

    def change(self, slots: Tensor, columns: Tensor) -> None:
        """Write the columns that a step changes, [len(CHANGING), R] int64."""
        self._all.ints[: len(CHANGING)].index_copy_(1, slots, columns)
