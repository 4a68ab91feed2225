"""From the host to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    """`values` on the device, int64 if they are numbers; the host does not wait for the copy.

    A plain copy would also wait for all that the device has still to do.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    return tensor.to(device, non_blocking=True)
