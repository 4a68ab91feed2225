"""Objects that hold tensors, taken apart for the way between ranks.

The packed, everything but the tensors' contents, is small and travels through a pipe; the
contents travel together, as one tensor, from device to device.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle

import torch
from torch import Tensor

#: What a tensor looks like.
Shape = tuple[torch.dtype, tuple[int, ...]]

#: Each tensor begins at a multiple of this, as the largest numbers ask for.
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class PackedObject:
    """An object without the contents of its tensors."""

    shapes: list[Shape]
    pickled: bytes

    def fill(self, tensors: list[Tensor]) -> object:
        """The object, with these tensors in it."""
        return _Unpickler(io.BytesIO(self.pickled), tensors).load()


def pack_tensors(value: object) -> tuple[PackedObject, list[Tensor]]:
    """The packed of `value`, and its tensors in the packed's order."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(value)
    tensors = pickler.tensors
    return PackedObject([(t.dtype, tuple(t.shape)) for t in tensors], stream.getvalue()), tensors


def num_bytes(shapes: list[Shape]) -> int:
    """Bytes that tensors of these shapes take side by side."""
    return sum(_padded(shape) for shape in shapes)


def to_bytes(tensors: list[Tensor], device: str) -> Tensor:
    """The tensors side by side: uint8."""
    shapes: list[Shape] = [(t.dtype, tuple(t.shape)) for t in tensors]
    buffer = torch.empty(num_bytes(shapes), dtype=torch.uint8, device=device)
    for place, tensor in zip(from_bytes(buffer, shapes), tensors, strict=True):
        place.copy_(tensor)
    return buffer


def from_bytes(buffer: Tensor, shapes: list[Shape]) -> list[Tensor]:
    """The tensors that lie in `buffer`; not copied."""
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
    """Puts a number where a tensor stands."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back where their numbers stand."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
