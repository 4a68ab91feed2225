"""Packs objects that hold tensors, to send them between ranks.

Everything except the tensors' contents is small and goes through a socket. The contents go from
device to device as one tensor.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle

import torch
from torch import Tensor

#: Type and shape of a tensor.
Shape = tuple[torch.dtype, tuple[int, ...]]

#: Each tensor begins at a multiple of this: the size of the largest number type.
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class PackedObject:
    """An object without the contents of its tensors."""

    shapes: list[Shape]
    pickled: bytes

    def fill(self, tensors: list[Tensor]) -> object:
        """Restore the object with these tensors."""
        return _Unpickler(io.BytesIO(self.pickled), tensors).load()


def pack_tensors(value: object) -> tuple[PackedObject, list[Tensor]]:
    """Split `value` into a packed object and its tensors, in the order of the shapes."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(value)
    tensors = pickler.tensors
    return PackedObject([(t.dtype, tuple(t.shape)) for t in tensors], stream.getvalue()), tensors


def num_bytes(shapes: list[Shape]) -> int:
    """Bytes of one buffer that holds tensors of these shapes."""
    return sum(_padded(shape) for shape in shapes)


def to_bytes(tensors: list[Tensor], device: str) -> Tensor:
    """Copy the tensors into one uint8 buffer."""
    shapes: list[Shape] = [(t.dtype, tuple(t.shape)) for t in tensors]
    buffer = torch.empty(num_bytes(shapes), dtype=torch.uint8, device=device)
    for target, tensor in zip(from_bytes(buffer, shapes), tensors, strict=True):
        target.copy_(tensor)
    return buffer


def from_bytes(buffer: Tensor, shapes: list[Shape]) -> list[Tensor]:
    """The tensors in `buffer`, without copying them."""
    tensors, start = [], 0
    for dtype, shape in shapes:
        end = start + math.prod(shape) * dtype.itemsize
        tensors.append(buffer[start:end].view(dtype).view(shape))
        start += _padded((dtype, shape))
    return tensors


def _padded(shape: Shape) -> int:
    size = math.prod(shape[1]) * shape[0].itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Pickler(pickle.Pickler):
    """Replaces each tensor by its index."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Replaces each index by its tensor."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, index: int) -> Tensor:
        return self._tensors[index]
