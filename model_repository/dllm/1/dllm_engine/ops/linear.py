"""Linear maps with what follows them, and the packed weights that make them fast on a CPU.

For float32 on a CPU the weights are packed once for oneDNN, which also applies the addition or
activation that follows while a result is still in cache: on AVX2 machines 1.1 to 1.8 times as fast
as torch's own call (docs/decisions/014). Results of a row do not depend on the number of rows.
Quantised weights (docs/decisions/015) stay as they are: torch's call knows them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_engine.ops.quantization import is_quantized

#: x [rows, in_features], weight [out_features, in_features] and bias to x @ weight.T + bias.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: Residual [rows, out_features], x and weight to residual + x @ weight.T, of which the residual may
#: be overwritten.
AddedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]
#: See `silu_mul`.
SiluMul = Callable[[Tensor], Tensor]

#: Row count that the packed layout is chosen for; others work too.
_ROWS_HINT = 256
#: Of smaller weights a call of oneDNN costs more than it gains.
_SMALLEST = 2**17


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [rows, 2 × n], gates before what they gate, to [rows, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x @ weight.T; the weight may be quantised."""
    return residual + F.linear(x, weight)


def add_linear_in_place(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same where the residual lies, in one call, whose sum is rounded once."""
    if is_quantized(weight):
        return add_linear(residual, x, weight)
    return residual.addmm_(x, weight.T)


def can_pack(weight: Tensor) -> bool:
    """Whether a weight of this type, place and size is worth packing."""
    if is_quantized(weight):
        return False
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    large = weight.numel() >= _SMALLEST
    return on_cpu and large and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def pack(weight: Tensor) -> Tensor:
    """An opaque packed copy of `weight` [out, in], for `packed_linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
    return packed


def packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """x @ weight.T + bias, then `activation` ("none" or "swish")."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "")
    return out


def _packed_combined(x: Tensor, other: Tensor, packed: Tensor, how: str) -> Tensor:
    """x @ weight.T, combined with `other` of the same shape: "add" or "mul"."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, None, how)
    return out


class Linear(nn.Module):
    """x @ weight.T (+ bias), and optionally a residual added to it.

    Args:
        product: makes it, where the weight is not packed.
        added: the same where there is a residual.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        product: Product = F.linear,
        added: AddedProduct = add_linear,
    ) -> None:
        super().__init__()
        self._product, self._added = product, added
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._packed: Tensor | None = None

    def pack(self) -> None:
        """Replace the weight by its packed form, where that pays."""
        if can_pack(self.weight):
            self._packed = pack(self.weight)
            del self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[rows, in_features] to [rows, out_features]; no residual where there is a bias.

        The residual may be overwritten.
        """
        if residual is None:
            if self._packed is None:
                return self._product(x, self.weight, self.bias)
            return packed_linear(x, self._packed, self.bias)
        if self._packed is None:
            return self._added(residual, x, self.weight)
        return _packed_combined(x, residual, self._packed, "add")


class GatedLinear(nn.Module):
    """silu(x @ gate.T) * (x @ up.T), the first half of a SwiGLU MLP; both in one weight.

    See `Linear` for `product`; `gate` multiplies its halves where the weight is not packed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        product: Product = F.linear,
        gate: SiluMul = silu_mul,
    ) -> None:
        super().__init__()
        self._product, self._gate = product, gate
        self.weight = nn.Parameter(torch.empty(2 * out_features, in_features))
        self._packed: tuple[Tensor, Tensor] | None = None

    def pack(self) -> None:
        """Replace the weight by its packed halves, where that pays."""
        if can_pack(self.weight):
            gate, up = self.weight.chunk(2)
            self._packed = (pack(gate.contiguous()), pack(up.contiguous()))
            del self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        if self._packed is None:
            return self._gate(self._product(x, self.weight, None))
        gate, up = self._packed
        return _packed_combined(x, packed_linear(x, gate, None, "swish"), up, "mul")
