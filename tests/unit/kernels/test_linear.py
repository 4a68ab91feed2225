"""The batch-invariant product equals torch's."""

import torch
import torch.nn.functional as F
from dllm_engine.ops.kernels.linear import add_invariant_linear, invariant_linear
from dllm_engine.ops.linear import add_linear, add_linear_in_place
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.budget import examples
from tests.unit.kernels.cases import DEVICE, DTYPES, near


@given(
    st.integers(0, 150),
    st.integers(1, 150),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
@settings(max_examples=examples(15))
def test_product(
    rows: int, inner: int, columns: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    """The product is right for any sizes, with and without a bias."""
    torch.manual_seed(seed)
    x = torch.randn(rows, inner).to(DEVICE, dtype)
    weight = (torch.randn(columns, inner) / inner**0.5).to(DEVICE, dtype)
    added = torch.randn(columns).to(DEVICE, dtype) if bias else None
    wanted = F.linear(x.double(), weight.double(), None if added is None else added.double())
    near(invariant_linear(x, weight, added), wanted, dtype)


@given(
    st.integers(1, 50),
    st.integers(1, 100),
    st.integers(1, 100),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
@settings(max_examples=examples(15))
def test_a_residual_is_added_where_it_lies(
    rows: int, inner: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    """torch's sum is made in place; the batch-invariant one leaves the residual unchanged."""
    torch.manual_seed(seed)
    x, residual = torch.randn(rows, inner), torch.randn(rows, columns)
    x, residual = x.to(DEVICE, dtype), residual.to(DEVICE, dtype)
    weight = (torch.randn(columns, inner) / inner**0.5).to(DEVICE, dtype)
    wanted = residual.double() + x.double() @ weight.double().T
    near(add_invariant_linear(residual, x, weight), wanted, dtype)
    near(add_linear(residual, x, weight), wanted, dtype)
    found = add_linear_in_place(residual, x, weight)
    near(found, wanted, dtype)
    assert found.data_ptr() == residual.data_ptr()


def test_a_row_has_the_same_result_in_any_company() -> None:
    """A row is bitwise the same at every place and for every number of rows."""
    torch.manual_seed(0)
    x, weight = torch.randn(200, 130, device=DEVICE), torch.randn(70, 130, device=DEVICE)
    whole = invariant_linear(x, weight)
    for rows in (slice(0, 1), slice(63, 66), slice(150, 200)):
        assert torch.equal(invariant_linear(x[rows], weight), whole[rows])
