"""From the host to the device, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Numbers on the host.
Array = npt.NDArray[Any]

#: Each array begins at a multiple of this on the device, as those do that torch allocates: kernels
#: are compiled anew for others.
_ALIGNMENT = 512
#: Room for what one step sends; whatever is left over goes by itself.
UPLOAD_BYTES = 2**21


class Upload:
    """Sends arrays to the device with one copy, for which the host does not wait.

    What a call returns holds nothing before `send`. On the CPU it is the array itself.

    Args:
        staged: whether arrays are copied at all.
    """

    def __init__(self, device: str, *, staged: bool | None = None) -> None:
        self._device = device
        self._here: Tensor | None = None
        self._used = 0
        if device != "cpu" if staged is None else staged:
            pinned = device.startswith("cuda")
            # The allocators keep both until the copy has been made.
            self._here = torch.empty(UPLOAD_BYTES, dtype=torch.uint8, pin_memory=pinned)
            self._there = torch.empty(UPLOAD_BYTES, dtype=torch.uint8, device=device)
            self._bytes = self._here.numpy()

    def __call__(self, array: Array) -> Tensor:
        """Where `array` will be, of its shape and type."""
        array = np.ascontiguousarray(array)
        if self._here is None:
            return torch.from_numpy(array)
        start, end = self._used, self._used + array.nbytes
        if end > UPLOAD_BYTES:
            return torch.from_numpy(array).to(self._device, non_blocking=True)
        self._bytes[start:end] = array.reshape(-1).view(np.uint8)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        dtype = torch.from_numpy(array).dtype
        return self._there[start:end].view(dtype).view(array.shape)

    def send(self) -> None:
        """Begin the copy."""
        if self._here is not None:
            used = min(self._used, UPLOAD_BYTES)
            self._there[:used].copy_(self._here[:used], non_blocking=True)


class Download:
    """Brings a tensor to the host.

    The host waits in `array` alone, and for what the device was asked for before, not for more.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._here = tensor
        if tensor.device.type == "cuda":
            self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._here.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def array(self) -> Array:
        """What it holds."""
        if self._event is not None:
            self._event.synchronize()
        return self._here.numpy()
