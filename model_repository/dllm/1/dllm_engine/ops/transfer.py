"""From the host to the device, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Numbers on the host.
Array = npt.NDArray[Any]

#: On the device each array begins at a multiple of this, like torch's own allocations: kernels
#: would be compiled again for other alignments.
_ALIGNMENT = 512
#: Bytes that one copy of a step sends; arrays beyond that are copied one by one.
UPLOAD_BYTES = 2**21


class Upload:
    """Sends arrays to the device with one copy, without waiting for it.

    The tensors it returns hold nothing before `send`. On a CPU they are the arrays themselves.

    Args:
        staged: whether to copy arrays through a buffer; None: unless the device is a CPU.
    """

    def __init__(self, device: str, *, staged: bool | None = None) -> None:
        self._device = device
        self._here: Tensor | None = None
        self._used = 0
        if device != "cpu" if staged is None else staged:
            pinned = device.startswith("cuda")
            # The allocators keep both buffers until the copy is done.
            self._here = torch.empty(UPLOAD_BYTES, dtype=torch.uint8, pin_memory=pinned)
            self._there = torch.empty(UPLOAD_BYTES, dtype=torch.uint8, device=device)
            self._bytes = self._here.numpy()

    def __call__(self, array: Array) -> Tensor:
        """The tensor that will hold `array` once `send` is called."""
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
        """Start the copy."""
        if self._here is not None:
            used = min(self._used, UPLOAD_BYTES)
            self._there[:used].copy_(self._here[:used], non_blocking=True)


class Download:
    """Copies a tensor to the host without waiting for it.

    Only `array` waits, and only for work that was queued before this copy.
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
        """Wait for the copy and return the numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._here.numpy()
