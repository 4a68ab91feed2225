"""RMSNorm, rotary and gate kernels equal torch's operations."""

import torch
from dllm_engine.ops.kernels import norm as kernels
from dllm_engine.ops.linear import silu_mul
from dllm_engine.ops.norm import rms_norm
from dllm_engine.ops.rotary import Rope, RotaryTable, apply_rotary
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.budget import examples
from tests.unit.kernels.cases import DEVICE, DTYPES, near


@given(st.integers(0, 9), st.integers(1, 100), st.sampled_from(DTYPES), st.integers(0, 2**31))
@settings(max_examples=examples(25))
def test_rms_norm(rows: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    """RMSNorm is right for any number of rows and any width."""
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, dim), torch.randn(dim)
    x, weight = x.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    near(kernels.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5), dtype)


@given(st.integers(0, 9), st.integers(1, 5), st.sampled_from(DTYPES), st.integers(0, 2**31))
@settings(max_examples=examples(15))
def test_rms_norm_of_heads(rows: int, heads: int, dtype: torch.dtype, seed: int) -> None:
    """Each head of a slice of heads is normalised by itself, with weights of its own."""
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, heads + 2, 24), torch.randn(heads, 24)
    x, weight = x.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    plain = torch.stack([rms_norm(x[:, head], weight[head], 1e-5) for head in range(heads)], dim=1)
    near(rms_norm(x[:, :heads], weight, 1e-5), plain, dtype)
    near(kernels.rms_norm(x[:, :heads], weight, 1e-5), plain, dtype)


@given(
    st.integers(0, 9),
    st.integers(1, 5),
    st.sampled_from([2, 8, 24, 64]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
@settings(max_examples=examples(25))
def test_rotary(rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int) -> None:
    """The rotated heads change in place and the other heads stay unchanged."""
    torch.manual_seed(seed)
    table = RotaryTable(head_dim, 64, Rope(theta=10000.0), device=DEVICE, dtype=dtype)
    cos, sin = table.at(torch.randint(0, 64, (rows,), device=DEVICE))
    x = torch.randn(rows, heads + 2, head_dim).to(DEVICE, dtype)
    before = x.clone()
    found = kernels.apply_rotary(x[:, :heads], cos, sin)
    near(found, apply_rotary(before[:, :heads], cos, sin), dtype)
    assert torch.equal(x[:, heads:], before[:, heads:])


@given(
    st.integers(0, 9),
    st.integers(1, 100) | st.sampled_from([2047, 2048, 4097]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
@settings(max_examples=examples(25))
def test_silu_mul(rows: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    """The gate is right for any number of rows, any width and gates of any magnitude."""
    torch.manual_seed(seed)
    gate_up = (8 * torch.randn(rows, 2 * dim)).to(DEVICE, dtype)
    near(kernels.silu_mul(gate_up), silu_mul(gate_up), dtype)
