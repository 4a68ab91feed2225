"""The kernel that draws under filters equals torch's, which equals the definition by sorting."""

import dataclasses
from typing import Any

import pytest
import torch
from dllm_engine.ops import draw, noise
from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import Filters, HeadOptions, HeadStatistics
from dllm_engine.ops.kernels import draw as kernel
from dllm_engine.sampling import full_logits
from dllm_engine.sampling.candidates import sample_candidates
from dllm_engine.sampling.rows import SpecialTokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.budget import examples
from tests.support.decoder import filtered
from tests.support.sampling import row_sampling
from tests.unit.kernels.cases import DEVICE, DTYPES, KERNELS

MASK, EOS, EOT = 5, 1, 2


def rows_of(seed: int, rows: int, vocabulary: int, *, coarse: bool) -> tuple[Tensor, Any, Any]:
    """Logits with rows of every kind, their options and filters; `coarse` ones have many equals."""
    torch.manual_seed(seed)
    logits = torch.randn(rows, vocabulary) * 3
    if coarse:
        logits = logits.round()
    place = torch.arange(rows)
    options = HeadOptions(
        mask=MASK,
        eos=torch.tensor([EOS]),
        stop=torch.tensor([EOS, EOT]),
        logits_eos_inf=place % 3 == 0,
        confidence_eos_eot_inf=place % 4 == 0,
        inverse_temperature=(place % 5 > 0) / (0.3 + torch.rand(rows)),
        keys=torch.randint(-(2**62), 2**62, (rows,)),
        needs_entropy=True,
    )
    top_p = torch.where(place % 2 == 0, torch.rand(rows, dtype=torch.float64), 1.0)
    top_k = torch.randint(0, 2 * vocabulary, (rows,)) * (place % 3 > 0)
    filters = Filters(top_p, top_k, place % 7 < 4, uses_top_p=True, most_top_k=2 * vocabulary)
    return logits, options, filters


@given(
    st.integers(0, 2**31), st.integers(10, 700), st.booleans(), st.sampled_from([1, 2, 300, 512])
)
@settings(max_examples=examples(8), deadline=None)
def test_filters_keep_what_sorting_keeps(
    seed: int, vocabulary: int, coarse: bool, sorted_first: int
) -> None:
    """In float64 a row's token and statistics equal those of top-p, then top-k, written with a
    sort, however many tokens are sorted first."""
    logits, options, filters = rows_of(seed, 14, vocabulary, coarse=coarse)
    logits = logits.double()
    assert options.inverse_temperature is not None
    options = dataclasses.replace(options, inverse_temperature=options.inverse_temperature.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "_SORTED", sorted_first)
        found = draw.draw(logits.clone(), options, filters)
    for i, row in enumerate(logits):
        if options.logits_eos_inf[i]:
            row[EOS] = -torch.inf
        inverse = float(options.inverse_temperature[i]) or 1.0
        allowed = row.clone()
        allowed[MASK] = -torch.inf
        scaled = (allowed - allowed.max()) * inverse
        top_p = float(filters.top_p[i])
        kept = filtered(scaled, top_p if top_p < 1 else None, None)
        if filters.top_k[i] > 0:
            kth = kept.sort(descending=True).values[min(int(filters.top_k[i]), vocabulary) - 1]
            kept = kept.masked_fill(kept < kth, -torch.inf)
        score = kept
        if options.inverse_temperature[i] > 0:
            score = kept + noise.gumbel(options.keys[i : i + 1], vocabulary)[0]
        token = int(score.argmax())
        assert found.token[i] == token
        if filters.tempered[i]:
            row = kept
        elif options.confidence_eos_eot_inf[i]:
            row[[EOS, EOT]] = -torch.inf
        distribution = row.softmax(0)
        ours = (found.logit[i] - found.max_logit[i]).exp() / found.sum_exp[i]
        torch.testing.assert_close(ours, distribution[token])
        best = row.topk(2).values
        torch.testing.assert_close(
            torch.stack([found.max_logit[i], found.second[i]]).clamp(-1e30), best.clamp(-1e30)
        )
        entropy = found.sum_exp[i].log() - found.sum_exp_logit[i] / found.sum_exp[i]
        wanted = -torch.special.xlogy(distribution, distribution).sum()
        torch.testing.assert_close(entropy, wanted, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 2**31), st.integers(100, 200), st.booleans(), st.sampled_from(DTYPES))
@settings(max_examples=examples(2), deadline=None)
def test_the_kernel_draws_as_torch_does(
    seed: int, vocabulary: int, coarse: bool, dtype: torch.dtype
) -> None:
    """Tokens equal torch's, and statistics are near, also for equal logits at the border and for
    rows of several blocks."""
    logits, options, filters = rows_of(seed, 4, vocabulary, coarse=coarse)
    logits = logits.to(dtype)
    wanted = draw.draw(logits.float(), options, filters)

    def on_device(value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    options, filters = (
        dataclasses.replace(x, **{n: on_device(v) for n, v in vars(x).items()})
        for x in (options, filters)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_BLOCK", 128)
        found = kernel.draw(logits.to(DEVICE), options, filters)
    assert found.token.tolist() == wanted.token.tolist()
    for name in ("logit", "max_logit", "second", "sum_exp", "sum_exp_logit"):
        torch.testing.assert_close(
            getattr(found, name).cpu(), getattr(wanted, name), rtol=1e-4, atol=1e-4
        )


class Counter(TorchDispatchMode):
    """Counts operations other than views and allocations, and the matrix products of them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count it and go on."""
        aten = torch.ops.aten
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        allocates = func.overloadpacket in (aten.empty, aten.new_empty, aten.empty_like)
        self.operations += not (is_view or allocates)
        self.products += func.overloadpacket is aten.mm
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("columns", [{"top_p": 0.95, "dream_statistics": True}, {"top_k": 50}])
def test_a_step_of_filtered_rows_is_few_operations(
    columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU 1,024 rows with a filter take at most 8 products and 100 operations, launches of
    the kernel included."""
    launches = []

    def launch(logits: Tensor, *_: Any) -> HeadStatistics:
        launches.append(len(logits))
        return HeadStatistics(
            torch.empty(len(logits), dtype=torch.int64), *torch.empty(6, len(logits)).unbind()
        )

    head = Head(torch.zeros(300, 16), dataclasses.replace(KERNELS, draw=launch))
    special = SpecialTokens(MASK, torch.tensor([EOS]), torch.tensor([EOS, EOT]))
    # As on a GPU, where chunks have one size.
    monkeypatch.setattr(full_logits, "_rows_at_once", lambda *_: 128)
    sampling = row_sampling(1024, temperature=0.2, **columns)
    with Counter() as counts:
        sample_candidates(
            torch.zeros(1024, 16), head, sampling, special, budget_bytes=2**26, needs_entropy=True
        )
    assert counts.products == len(launches) == 8
    assert counts.operations + len(launches) <= 100
