"""Rows of hidden states and logits: padding, number types, forbidden tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

#: Row counts are padded to a multiple of this. Matrix kernels choose their inner loops by the
#: number of rows if there are very few; with 8 rows or more, a row's result was measured not to
#: depend on its neighbours.
ROW_MULTIPLE = 16


class Rows:
    """Base of dataclasses whose fields hold one entry per row; other fields are for all rows."""

    def take(self, index: slice | Tensor) -> Self:
        """Some of the rows."""

        def some(value: Any) -> Any:
            return value.take(index) if isinstance(value, Rows) else value[index]

        rows = {k: some(v) for k, v in vars(self).items() if isinstance(v, Rows | Tensor)}
        return dataclasses.replace(self, **rows)  # type: ignore[type-var]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Concatenate several groups of rows."""
        columns: dict[str, Any] = {}
        for name, first in vars(parts[0]).items():
            values = [getattr(part, name) for part in parts]
            if isinstance(first, Rows):
                columns[name] = first.joined(values)
            else:
                columns[name] = None if first is None else torch.cat(values)
        return cls(**columns)


def pad_rows(hidden: Tensor) -> Tensor:
    """Add zero rows up to a multiple of `ROW_MULTIPLE`."""
    missing = -hidden.shape[0] % ROW_MULTIPLE
    return F.pad(hidden, (0, 0, 0, missing)) if missing else hidden


def widen(logits: Tensor) -> Tensor:
    """Convert to float32, unless the type is wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def forbid(logits: Tensor, where: Tensor, ids: Tensor) -> None:
    """Set the logits of tokens `ids` to −inf in the rows that `where` [rows] selects."""
    logits[:, ids] = logits[:, ids].masked_fill_(where.unsqueeze(1), -torch.inf)
