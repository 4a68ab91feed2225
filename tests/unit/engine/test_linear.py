"""Packed weights compute the same as plain ones, and rows do not influence each other."""

import pytest
import torch
from dllm_engine.ops.head import Head
from dllm_engine.ops.linear import GatedLinear, Linear, can_pack
from torch import Tensor

ROWS = [16, 32, 48, 256, 1024]


def fill(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 16


def plain_gated(weight: Tensor, x: Tensor) -> Tensor:
    gate, up = (x @ weight.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("width", [64, 512], ids=["small", "large"])
@torch.inference_mode()
def test_packed_maps_equal_plain_ones(width: int) -> None:
    """Packed maps equal plain ones within float32's rounding, with bias, residual, gate and the
    head's tiles."""
    linear, summed = Linear(width, width, bias=True), Linear(width, width, bias=False)
    gated = GatedLinear(width, width)
    for module in (linear, summed, gated):
        fill(module)
    x, residual = torch.randn(2, 48, width)
    expected = [
        x @ linear.weight.T + linear.bias,
        residual + x @ summed.weight.T,
        plain_gated(gated.weight, x),
    ]
    if width == 512 and can_pack(linear.weight):
        assert all(can_pack(module.weight) for module in (summed, gated))
    for module in (linear, summed, gated):
        module.pack()
    for found, wanted in zip([linear(x), summed(x, residual), gated(x)], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    weight = torch.randn(5000, width) / 16
    head = Head(weight.clone())
    logits = torch.cat([head.logits(x, start) for start in head.tile_starts], dim=1)
    torch.testing.assert_close(logits, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [64, 512], ids=["small", "large"])
@torch.inference_mode()
def test_result_of_a_row_does_not_depend_on_the_number_of_rows(width: int) -> None:
    """A row is bitwise the same for every row count of a step."""
    linear, gated = Linear(width, width, bias=False), GatedLinear(width, width)
    for module in (linear, gated):
        fill(module)
        module.pack()
    head = Head(torch.randn(5000, width) / 16)
    x = torch.randn(max(ROWS), width)
    maps = [linear, lambda rows: linear(rows, rows), gated]
    maps += [lambda rows, start=start: head.logits(rows, start) for start in head.tile_starts]
    for apply in maps:
        everything = apply(x)
        for rows in ROWS:
            assert torch.equal(apply(x[:rows].clone()), everything[:rows])
