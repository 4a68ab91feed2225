"""Rows of hidden states and logits: padding, number types, forbidden tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Row counts are padded to a multiple of this. Matrix kernels choose their inner loops by the
#: number of rows if there are very few; with 8 rows or more, a row's result was measured not to
#: depend on its neighbours.
ROW_MULTIPLE = 16


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
