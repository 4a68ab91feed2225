"""The head kernel equals statistics of float64 logits, and the torch implementation."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from dllm_engine.ops import noise
from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import HeadOptions, HeadStatistics
from dllm_engine.ops.kernels import head as kernels
from dllm_engine.ops.kernels import noise as kernel_noise
from dllm_engine.parallel.head import merge
from dllm_engine.sampling.candidates import sample_candidates
from dllm_engine.sampling.credit import LISTED, Credits
from dllm_engine.sampling.rows import SpecialTokens
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.budget import examples
from tests.support.sampling import row_sampling
from tests.unit.kernels.cases import DEVICE, DTYPES, KERNELS

#: Products of numbers of any type are exact in float32, sums of some hundred rounded.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A head and its rows; all numbers are drawn from `seed`."""

    rows: int
    vocabulary: int
    width: int
    dtype: torch.dtype
    seed: int
    noisy: bool = False
    needs_entropy: bool = False
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, HeadOptions]:
        """Hidden states, weight and options, with rows of every kind."""
        torch.manual_seed(self.seed)
        hidden = torch.randn(self.rows, self.width).to(DEVICE, self.dtype)
        weight = torch.randn(self.vocabulary, self.width).to(DEVICE, self.dtype)
        tokens = torch.randperm(self.vocabulary, device=DEVICE)

        def some() -> Tensor:
            return torch.rand(self.rows, device=DEVICE) < 0.6

        cold = 1 / (torch.rand(self.rows, device=DEVICE) + 0.2)
        return (
            hidden,
            weight,
            HeadOptions(
                mask=int(tokens[0]),
                eos=tokens[1:3],
                stop=tokens[2:5],
                logits_eos_inf=some() if self.logits_eos_inf else None,
                confidence_eos_eot_inf=some() if self.confidence_eos_eot_inf else None,
                inverse_temperature=cold * some() if self.noisy else None,
                keys=torch.randint(-(2**62), 2**62, (self.rows,), device=DEVICE),
                needs_entropy=self.needs_entropy,
            ),
        )


CASES = st.builds(
    Case,
    rows=st.integers(0, 5),
    vocabulary=st.integers(6, 300),
    width=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    noisy=st.booleans(),
    needs_entropy=st.booleans(),
    logits_eos_inf=st.booleans(),
    confidence_eos_eot_inf=st.booleans(),
)


def near(found: Tensor, wanted: Tensor) -> None:
    """Assert that both are equal within `TOLERANCE`."""
    torch.testing.assert_close(found.double(), wanted.double(), rtol=TOLERANCE, atol=TOLERANCE)


def check(found: HeadStatistics, hidden: Tensor, weight: Tensor, options: HeadOptions) -> None:
    """Assert that the statistics are those of float64 logits."""
    for i in range(len(hidden)):
        logits = weight.double() @ hidden[i].double()
        if options.logits_eos_inf is not None and options.logits_eos_inf[i]:
            logits[options.eos] = -torch.inf
        scores = logits.clone()
        scores[options.mask] = -torch.inf
        tolerance = TOLERANCE * (1 + float(logits.max().abs()))
        if options.inverse_temperature is not None and options.inverse_temperature[i] > 0:
            assert options.keys is not None
            scores = scores * options.inverse_temperature[i]
            scores += noise.gumbel(options.keys[i : i + 1], len(weight))[0]
            tolerance *= float(options.inverse_temperature[i])
        best = scores.topk(2).values
        token = int(found.token[i])
        if best[0] - best[1] > tolerance:
            assert token == scores.argmax()
        assert scores[token] >= best[0] - tolerance
        assert abs(found.score[i] - scores[token]) <= tolerance
        near(found.logit[i], logits[token])
        if options.confidence_eos_eot_inf is not None and options.confidence_eos_eot_inf[i]:
            logits[options.stop] = -torch.inf
        max_logit, second = logits.topk(2).values
        mass = (logits - max_logit).exp()
        near(found.max_logit[i], max_logit)
        near(found.sum_exp[i], mass.sum())
        if options.needs_entropy:
            near(found.second[i], second)
            near(found.sum_exp_logit[i], torch.special.xlogy(mass, mass).sum())


@given(CASES)
@example(Case(0, 9, 5, torch.float32, 1, needs_entropy=True))
@example(Case(3, 260, 130, torch.float32, 2, noisy=True, logits_eos_inf=True))
@example(
    Case(
        130, 140, 3, torch.bfloat16, 3, noisy=True, needs_entropy=True, confidence_eos_eot_inf=True
    )
)
@settings(max_examples=examples(30))
def test_statistics_are_those_of_the_logits(case: Case) -> None:
    """For all sizes, types and kinds of rows, tokens are exact and numbers near those of
    float64."""
    hidden, weight, options = case.tensors()
    check(Head(weight, KERNELS).statistics(hidden, options), hidden, weight, options)


@pytest.mark.parametrize("noisy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_split_may_have_several_tiles(noisy: bool) -> None:
    """Splits may have several tiles and different lengths, with the two largest logits in one split
    in either order or equal; the leftmost of equal tokens wins."""
    case = Case(
        3, 8600, 5, torch.float32, 4, noisy=noisy, needs_entropy=True, confidence_eos_eot_inf=True
    )
    hidden, weight, options = case.tensors()
    weight[[3, 70]] = torch.tensor([[10.0], [20.0]], device=DEVICE) * hidden[0]
    weight[[130, 200]] = torch.tensor([[20.0], [10.0]], device=DEVICE) * hidden[1]
    weight[[260, 330]] = 20.0 * hidden[2]
    _, each, splits = kernels.splits_of(weight)
    assert each == 2
    assert splits * each * 64 > 8600 + 63
    found = Head(weight, KERNELS).statistics(hidden, options)
    check(found, hidden, weight, options)
    if not noisy:
        assert found.token.tolist() == [70, 130, 260]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_result_in_any_company(dtype: torch.dtype) -> None:
    """A row has bitwise the same result alone, even if other rows need noise, entropy or forbidden
    tokens."""
    case = Case(
        140,
        200,
        90,
        dtype,
        5,
        noisy=True,
        needs_entropy=True,
        logits_eos_inf=True,
        confidence_eos_eot_inf=True,
    )
    hidden, weight, options = case.tensors()
    assert options.inverse_temperature is not None
    assert options.logits_eos_inf is not None
    assert options.confidence_eos_eot_inf is not None
    assert options.keys is not None
    head = Head(weight, KERNELS)
    together = head.statistics(hidden, options)
    plain = (
        (options.inverse_temperature == 0)
        & ~options.logits_eos_inf
        & ~options.confidence_eos_eot_inf
    )
    for i in (int(plain.nonzero()[0]), 63, 64, int(plain.nonzero()[-1]), 139):
        mine = slice(i, i + 1)
        apart = dataclasses.replace(
            options,
            logits_eos_inf=options.logits_eos_inf[mine] if options.logits_eos_inf[i] else None,
            confidence_eos_eot_inf=options.confidence_eos_eot_inf[mine]
            if options.confidence_eos_eot_inf[i]
            else None,
            inverse_temperature=options.inverse_temperature[mine]
            if options.inverse_temperature[i] > 0
            else None,
            keys=options.keys[mine],
            needs_entropy=not plain[i],
        )
        alone = head.statistics(hidden[mine], apart)
        names = ["token", "score", "logit", "max_logit", "sum_exp"]
        for name in [*names, "second", "sum_exp_logit"] if apart.needs_entropy else names:
            assert torch.equal(getattr(alone, name), getattr(together, name)[mine]), name


@triton.jit
def _store_uniform(keys, out, first, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0)
    tokens = first + tl.arange(0, COUNT)
    numbers = kernel_noise.uniform(tl.load(keys + row), tokens.to(tl.int64))
    tl.store(out + row * COUNT + tl.arange(0, COUNT), numbers)


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3),
    st.integers(0, 2**20),
)
@settings(max_examples=examples(10))
def test_random_numbers_are_those_of_the_loop(parts: list[int], first: int) -> None:
    """The kernel's uniform numbers are bitwise those of `ops.noise` for any seed, step and
    position."""
    keys = noise.row_keys(*(torch.tensor([part], device=DEVICE) for part in parts), 1)
    out = torch.empty(1, 128, device=DEVICE)
    _store_uniform[(1,)](keys, out, first, 128)
    assert torch.equal(out, noise.token_uniform(keys, 128, first))


@pytest.mark.parametrize("best", [[40, 41], [7, 40], [7, 40, 200], [40, 60]])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_leftmost_of_equal_tokens_wins(best: list[int], noisy: bool) -> None:
    """The leftmost of equal tokens wins within a split and between splits, also for greedy rows
    among noisy ones."""
    weight = torch.zeros(300, 4, device=DEVICE)
    weight[best] = 1.0
    nothing = torch.tensor([], dtype=torch.int64, device=DEVICE)
    heat = torch.zeros(1, device=DEVICE) if noisy else None
    keys = torch.zeros(1, dtype=torch.int64, device=DEVICE) if noisy else None
    options = HeadOptions(7, nothing, nothing, None, None, heat, keys, needs_entropy=True)
    found = Head(weight, KERNELS).statistics(torch.ones(1, 4, device=DEVICE), options)
    assert found.token.tolist() == [40]  # 7 is the mask token
    assert found.max_logit.tolist() == found.second.tolist() == [4.0]


@pytest.mark.parametrize("cut", [40, 128])
def test_slices_of_the_vocabulary_together_are_the_whole(cut: int) -> None:
    """Merged statistics of two slices equal those of one head, with global token ids and noise."""
    case = Case(
        4,
        200,
        20,
        torch.float32,
        6,
        noisy=True,
        needs_entropy=True,
        logits_eos_inf=True,
        confidence_eos_eot_inf=True,
    )
    hidden, weight, options = case.tensors()
    extra_tokens = torch.randint(-1, 200, (4, LISTED), device=DEVICE)
    whole = Head(weight, KERNELS).statistics(hidden, options, extra_tokens)
    left = Head(weight[:cut], KERNELS).statistics(hidden, options, extra_tokens)
    right = Head(weight[cut:], KERNELS, first=cut).statistics(hidden, options, extra_tokens)
    merged = merge(left, right)
    assert torch.equal(merged.token, whole.token)
    for field in dataclasses.fields(whole):
        near(getattr(merged, field.name), getattr(whole, field.name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extra_tokens_have_their_logits(dtype: torch.dtype) -> None:
    """Extra tokens get their logits, and −∞ if empty, forbidden or not counted."""
    case = Case(5, 90, 300, dtype, 7, logits_eos_inf=True, confidence_eos_eot_inf=True)
    hidden, weight, options = case.tensors()
    assert options.logits_eos_inf is not None
    assert options.confidence_eos_eot_inf is not None
    extra_tokens = torch.randint(-1, 90, (5, LISTED), device=DEVICE)
    extra_tokens[:, :5] = torch.cat([options.eos, options.stop])
    found = Head(weight, KERNELS).statistics(hidden, options, extra_tokens).extra_logits
    assert found is not None
    logits = hidden.double() @ weight.double().T
    logits[options.logits_eos_inf.nonzero(), options.eos] = -torch.inf
    logits[options.confidence_eos_eot_inf.nonzero(), options.stop] = -torch.inf
    near(
        found, logits.gather(1, extra_tokens.clamp(min=0)).masked_fill(extra_tokens < 0, -torch.inf)
    )


class Watched(TorchDispatchMode):
    """Rejects operations whose result the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run `func` unless it is one of these."""
        name = func.name().removeprefix("aten::")
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
        assert name.split(".")[0] not in waits, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_candidates_are_those_of_the_loop_without_waiting(temperature: float) -> None:
    """Tokens, confidence, entropy, margin and credit equal those of torch, and the host never
    waits."""
    rows, vocabulary = 20, 150
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(rows, 16, generator=generator).to(DEVICE)
    weight = torch.randn(vocabulary, 16, generator=generator).to(DEVICE)
    ends = torch.tensor([3, 4], device=DEVICE)
    special = SpecialTokens(9, ends[:1], ends)
    place = torch.arange(rows)
    columns = {"temperature": temperature * (place % 3), "seed": place}
    columns |= {"logits_eos_inf": place % 4 == 0, "confidence_eos_eot_inf": place % 5 == 0}
    sampling = row_sampling(rows, DEVICE, **columns)
    tokens = torch.randint(-1, vocabulary, (rows, LISTED), generator=generator)
    credits = Credits(
        (place % 2 == 0).to(DEVICE),
        tokens.to(DEVICE),
        torch.rand(rows, LISTED, generator=generator).to(DEVICE) * (tokens >= 0).to(DEVICE),
    )
    options = {"budget_bytes": 1, "credits": None if temperature else credits}
    wanted = sample_candidates(hidden, Head(weight), sampling, special, **options)
    head = Head(weight, KERNELS)
    with Watched():
        found = sample_candidates(hidden, head, sampling, special, **options)
    assert torch.equal(found.token, wanted.token)
    for name in ("confidence", "entropy", "margin"):
        near(getattr(found, name), getattr(wanted, name))
    if not temperature:
        assert found.credits is not None
        assert wanted.credits is not None
        assert torch.equal(found.credits.tokens, wanted.credits.tokens)
        near(found.credits.values, wanted.credits.values)
