"""Linear maps fused with the operation after them, and packed weights for CPUs.

For float32 on a CPU, weights are packed once for oneDNN. It also applies the addition or activation
that follows while a result is still in cache, which on AVX2 machines is 1.1 to 1.8 times as fast as
torch's own call (docs/decisions/014). A row's result does not depend on the number of rows.
Quantised weights (docs/decisions/015) are not packed: torch's call supports them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_engine.ops.quantization import is_quantized

#: (x [rows, in_features], weight [out_features, in_features], bias) → x @ weight.T + bias.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: (residual [rows, out_features], x, weight) → residual + x @ weight.T. It may overwrite the
#: residual.
AddedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]
#: See `silu_mul`.
SiluMul = Callable[[Tensor], Tensor]

#: Row count that the packed layout is optimised for; others work too.
_ROWS_HINT = 256
#: For smaller weights, calling oneDNN costs more than it gains.
_SMALLEST = 2**17


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [rows, 2 × n], the gates in the first half, to [rows, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x @ weight.T; the weight may be quantised."""
    return residual + F.linear(x, weight)


def add_linear_in_place(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`add_linear` in place, in one call that rounds the sum once."""
    if is_quantized(weight):
        return add_linear(residual, x, weight)
    return residual.addmm_(x, weight.T)


def can_pack(weight: Tensor) -> bool:
    """Whether packing a weight of this type, device and size pays."""
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


def _packed_combined(
    x: Tensor, other: Tensor, packed: Tensor, bias: Tensor | None, how: str
) -> Tensor:
    """x @ weight.T + bias combined with `other` of the same shape; `how` is "add" or "mul"."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, how)
    return out


class Linear(nn.Module):
    """x @ weight.T (+ bias), and optionally a residual added to it.

    Args:
        product: computes it if the weight is not packed.
        added: computes it with a residual if the weight is not packed.
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
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """Replace the weight by its packed form if that pays."""
        if can_pack(self.weight):
            self.packed = pack(self.weight)
            del self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[rows, in_features] to [rows, out_features]. The residual may be overwritten."""
        if residual is None:
            if self.packed is None:
                return self._product(x, self.weight, self.bias)
            return packed_linear(x, self.packed, self.bias)
        if self.packed is None:
            if self.bias is not None:
                residual = residual + self.bias
            return self._added(residual, x, self.weight)
        return _packed_combined(x, residual, self.packed, self.bias, "add")


class GatedLinear(nn.Module):
    """silu(x @ gate.T) * (x @ up.T), the first half of a SwiGLU MLP, with one stacked weight.

    See `Linear` for `product`; `gate` multiplies its halves if the weight is not packed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        product: Product = F.linear,
        gate: SiluMul = silu_mul,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self._product, self._gate = product, gate
        self.weight = nn.Parameter(torch.empty(2 * out_features, in_features))
        self.bias = nn.Parameter(torch.empty(2 * out_features)) if bias else None
        self.packed: tuple[Tensor, Tensor] | None = None

    def pack(self) -> None:
        """Replace the weight by its packed halves if that pays."""
        if can_pack(self.weight):
            gate, up = self.weight.chunk(2)
            self.packed = (pack(gate.contiguous()), pack(up.contiguous()))
            del self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        if self.packed is None:
            return self._gate(self._product(x, self.weight, self.bias))
        gate, up = self.packed
        bias, up_bias = (None, None) if self.bias is None else self.bias.chunk(2)
        return _packed_combined(x, packed_linear(x, gate, bias, "swish"), up, up_bias, "mul")
