"""8-bit weights: their products, their memory, and the configurations that are rejected."""

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import LLM, EngineConfig, InvalidConfig, SamplingParams
from dllm_engine.models import dream, llada
from dllm_engine.models.loader import load_model, read_spec
from dllm_engine.ops.linear import GatedLinear, Linear
from dllm_engine.ops.quantization import make_quantizer
from dllm_engine.parallel.group import Group
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from demo import corpus
from tests.support.checkpoints import write_dream, write_llada
from tests.unit.test_docs import ROOT

DEMO = ROOT / "model_repository/dllm/1/demo_checkpoint"
#: Of weights alone; and all.
WEIGHTS = ["int8", "fp8"]
KINDS = [*WEIGHTS, "w8a8"]
MAPS = ("qkv", "out", "gate_up", "down")


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different magnitude, and one row of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.logspace(-3, 0, rows).unsqueeze(1)
    weight[rows // 2] = 0
    return weight.to(dtype)


def quantise(module: Linear | GatedLinear, kind: str) -> Tensor:
    """Quantise a map as the loader does; returns the weight it represents, in float32."""
    weight = make_quantizer(kind)(random_weight(*module.weight.shape, module.weight.dtype))
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.pack()
    plain: Tensor = weight.qdata.float() * weight.scale.float()  # type: ignore[attr-defined]
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_within_half_a_step_of_each_row(dtype: torch.dtype) -> None:
    """int8 rounds to 255 equal steps between plus and minus the row's largest magnitude."""
    weight = random_weight(64, 96, dtype)
    rounded = make_quantizer("int8")(weight).dequantize(torch.float32)  # type: ignore[operator]
    step = weight.float().abs().amax(1, keepdim=True) / 127.5
    assert ((rounded - weight.float()).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_is_within_a_sixteenth_of_each_number(dtype: torch.dtype) -> None:
    """fp8 has three bits of mantissa, and fewer for numbers far below the row's largest."""
    weight = random_weight(64, 96, dtype)
    rounded = make_quantizer("fp8")(weight).dequantize(torch.float32)  # type: ignore[operator]
    exact = weight.float()
    smallest = 2**-10 * exact.abs().amax(1, keepdim=True) / 448  # half a step below the normal ones
    assert ((rounded - exact).abs() <= 1.01 * (exact.abs() / 16 + smallest)).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=str,
)
@torch.inference_mode()
def test_quantised_maps_equal_plain_ones(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """A quantised product equals the product with the represented weights, within the rounding of
    its type, with bias, residual, gate and a row of zeros."""
    with torch.inference_mode(False):
        linear = Linear(320, 448, bias=True).to(dtype)
        summed, gated = Linear(320, 320, bias=False).to(dtype), GatedLinear(320, 448).to(dtype)
        weights = [quantise(module, kind) for module in (linear, summed, gated)]
    x, residual = torch.randn(2, 48, 320, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert linear.bias is not None
    nn.init.normal_(linear.bias)
    gate, up = (x.float() @ weights[2].T).chunk(2, dim=-1)
    expected = [
        x.float() @ weights[0].T + linear.bias.float(),
        residual.float() + x.float() @ weights[1].T,
        torch.nn.functional.silu(gate) * up,
    ]
    for found, wanted in zip([linear(x), summed(x, residual), gated(x)], expected, strict=True):
        assert found.dtype == dtype
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found.float() / scale, wanted / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("reduced", [False, True], ids=["8 bits", "7 bits"])
@torch.inference_mode()
def test_w8a8_multiplies_rounded_activations(
    reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """w8a8 is the exact product of weights and activations rounded row by row.

    It rounds to 8 bits, or to 7 where a CPU lacks VNNI.
    """
    monkeypatch.setattr("torchao.utils.should_reduce_range", lambda _device: reduced)
    with torch.inference_mode(False):
        weight = make_quantizer("w8a8")(random_weight(448, 320))
    x = torch.randn(48, 320, generator=torch.Generator().manual_seed(1))
    x[3] = 0
    most = 63 if reduced else 127
    step = (x.abs().amax(1, keepdim=True) / (most + 0.5)).clamp(min=1e-7)
    rounded = (x * (1 / step)).round().clamp(-most - 1, most)
    exact = rounded.double() @ weight.qdata.double().T  # type: ignore[attr-defined]
    wanted = exact * step.double() * weight.scale.double().flatten()  # type: ignore[attr-defined]
    assert weight.qdata.int().abs().max() <= most + 1  # type: ignore[attr-defined]
    found = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 512], ids=["small", "large"])
@torch.inference_mode()
def test_result_of_a_row_does_not_depend_on_the_number_of_rows(kind: str, width: int) -> None:
    """A row is bitwise the same for every row count of a step."""
    with torch.inference_mode(False):
        linear, gated = Linear(width, width, bias=False), GatedLinear(width, width)
        quantise(linear, kind), quantise(gated, kind)
    x = torch.randn(1024, width, generator=torch.Generator().manual_seed(1))
    maps: list[Callable[[Tensor], Tensor]] = [linear, lambda rows: linear(rows, rows), gated]
    for apply in maps:
        everything = apply(x)
        for rows in (16, 32, 48, 256):
            assert torch.equal(apply(x[:rows].clone()), everything[:rows])


def write_rounded(source: Path, target: Path, kind: str, ranks: int) -> Path:
    """Write the checkpoint with each linear map rounded to 8 bits."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    spec = read_spec(source)
    family = llada if spec.architecture in llada.ARCHITECTURES else dream
    tensors = load_file(source / "model.safetensors")
    quantize = make_quantizer(kind)
    for name, sources in family.tensors(spec).items():
        part, _, leaf = name.removeprefix("layers.").partition(".")[2].partition(".")
        if part not in MAPS or leaf != "weight":
            continue
        # Those split by inputs have scales of their own in each rank.
        pieces = ranks if part in ("out", "down") else 1
        for tensor in sources:
            rounded = [
                quantize(w.contiguous()).dequantize() for w in tensors[tensor].chunk(pieces, 1)
            ]
            tensors[tensor] = torch.cat(rounded, dim=1)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("write", "kind", "ranks"),
    [
        (write_llada, "fp8", 1),
        (write_dream, "int8", 1),
        pytest.param(write_llada, "int8", 2, marks=pytest.mark.slow),
    ],
    ids=["llada, fp8", "dream, int8", "llada, int8 over two ranks"],
)
def test_the_engine_decodes_what_it_does_with_the_rounded_checkpoint(
    tmp_path: Path, write: Callable[[Path], Path], kind: str, ranks: int
) -> None:
    """A quantised engine decodes the same tokens as a float32 engine with the rounded checkpoint,
    with every cache, guidance, thresholds and sampling, also split over ranks."""
    folder = write(tmp_path / "exact")
    rounded = write_rounded(folder, tmp_path / "rounded", kind, ranks)
    kinds: list[dict[str, object]] = [
        {},
        {"cache": "sparse", "cfg_scale": 1.0},
        {"cache": "dual", "confidence_threshold": 0.05},
        {"cache": "delayed", "remasking": "margin"},
        {"temperature": 0.8, "seed": 3},
    ]
    prompts = [[7 * i + 1, 2, 3] * (i + 1) for i in range(len(kinds))]
    params = [SamplingParams(gen_length=24, block_length=8, ignore_eos=True, **k) for k in kinds]  # type: ignore[arg-type]

    def answers(path: Path, **settings: object) -> list[tuple[list[int], list[float]]]:
        with LLM(path, **settings) as llm:
            made = llm.generate(prompts, params, progress=False)
        return [(a.token_ids.tolist(), a.confidence.tolist()) for a in made]

    found = answers(folder, quantization=kind, tensor_parallel_size=ranks)
    exact = answers(folder)
    for one, other in zip(found, answers(rounded), strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=1e-4)
    assert found[0][1] != pytest.approx(exact[0][1], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_questions_are_answered(kind: str) -> None:
    """Of four questions per demo task, at most two fewer are answered than in float32."""
    asked = [e for task in corpus.TASKS for e in corpus.held_out_set(task, 4)]

    def right(quantization: str) -> int:
        params = SamplingParams(gen_length=64, confidence_threshold=0.9)
        questions = [example.question for example in asked]
        llm = LLM(DEMO, quantization=quantization)
        answers = llm.generate(questions, params, chat=True, progress=False)
        pairs = zip(asked, answers, strict=True)
        return sum(answer.text.strip() == example.answer for example, answer in pairs)

    exact = right("none")
    assert exact >= 0.85 * len(asked)
    assert right(kind) >= exact - 2


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors inside a tensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in stored(getattr(tensor, name))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_counts_quantised_bytes(tmp_path: Path, kind: str, ranks: int) -> None:
    """The plan counts the exact bytes of a rank's quantised weights, fewer than unquantised."""
    folder = write_dream(tmp_path)
    spec = read_spec(folder).split(ranks)
    group = None if ranks == 1 else Group(0, ranks, "cpu", None)
    options = {"device": "cpu", "dtype": torch.float32, "group": group}
    model = load_model(folder, spec, quantization=kind, **options)  # type: ignore[arg-type]
    # Not among them: the head, which is in its own form by now, and in float32 as before.
    head = spec.vocab_size // ranks * spec.hidden_size * 4
    taken = sum(part.nbytes for p in model.parameters() for part in stored(p)) + head
    assert spec.weight_bytes(4, kind) == taken
    assert taken < spec.weight_bytes(4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_fits_only_quantised(tmp_path: Path, kind: str) -> None:
    """A memory limit that rejects float32 accepts 8 bits, and the plan shows their bytes."""
    folder = write_llada(tmp_path, n_layers=24)
    spec = read_spec(folder)
    limit = spec.weight_bytes(4) - 1
    settings = {
        "memory_limit": str(limit),
        "logits_budget_mb": 1,
        "max_num_batched_tokens": 64,
    }
    with pytest.raises(InvalidConfig, match="DLLM_MEMORY_LIMIT: .*DLLM_QUANTIZATION"):
        LLM(folder, dtype="float32", **settings)
    weights = spec.weight_bytes(4, kind)
    assert weights < 0.4 * limit
    settings["memory_limit"] = "64MiB"
    assert LLM(folder, quantization=kind, **settings).engine.runner.plan.weights == weights


def test_auto_is_a_smaller_type_where_float32_does_not_fit(tmp_path: Path) -> None:
    """On a CPU, DLLM_DTYPE auto is bfloat16 if float32 weights do not fit, and else float32."""
    folder = write_llada(tmp_path, d_model=256, mlp_hidden_size=1024, n_layers=12)
    spec = read_spec(folder)
    settings = {"logits_budget_mb": 1, "max_num_batched_tokens": 64, "max_num_seqs": 1}
    limit = str(spec.weight_bytes(4) - 1)
    small = LLM(folder, memory_limit=limit, **settings).engine.runner.plan.weights
    large = LLM(folder, **settings).engine.runner.plan.weights
    assert small == spec.weight_bytes(2) < spec.weight_bytes(4) <= large


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that torch allocates in a `with` block and has not freed."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        #: The most bytes alive at once.
        self.peak = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count new storages."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if type(tensor) is Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live:
                    self._live[key] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, key, None)
        self.peak = max(self.peak, sum(self._live.values()))
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_only_one_map_at_a_time_is_whole_while_loading(tmp_path: Path, kind: str) -> None:
    """Loading takes the final weights plus a few times the largest map in float32."""
    folder = write_llada(tmp_path, n_layers=16, d_model=128, mlp_hidden_size=384)
    spec = read_spec(folder)
    largest = 2 * 384 * 128 * 4
    peaks = {}
    for quantization in (kind, "none"):
        with LiveBytes() as live:
            load_model(folder, spec, device="cpu", dtype=torch.float32, quantization=quantization)
        peaks[quantization] = live.peak
    assert peaks["none"] >= spec.weight_bytes(4)
    assert peaks[kind] <= spec.weight_bytes(4, kind) + 6 * largest < 0.6 * spec.weight_bytes(4)


def test_int8_in_float16_would_overflow() -> None:
    """int8 with float16 can overflow before scaling, so the combination is rejected."""
    x, weight = torch.full((16, 4096), 2.0), torch.full((16, 4096), 2.0**-6)
    assert float(x[0] @ weight[0]) == 128
    quantised = make_quantizer("int8")(weight.half())
    assert torch.nn.functional.linear(x.half(), quantised).isinf().all()
    quantised = make_quantizer("fp8")(weight.half())
    assert torch.nn.functional.linear(x.half(), quantised).eq(128).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quantization": "int4"},
            "DLLM_QUANTIZATION: must be one of none, int8, .* got int4",
        ),
        ({"quantization": "int8", "dtype": "float64"}, "DLLM_QUANTIZATION: int8 .*float64"),
        ({"quantization": "fp8", "dtype": "float64"}, "DLLM_QUANTIZATION: fp8 .*float64"),
        ({"quantization": "int8", "dtype": "float16"}, "DLLM_QUANTIZATION: int8 .*bfloat16"),
        ({"quantization": "w8a8", "dtype": "float16"}, "DLLM_QUANTIZATION: w8a8 .*bfloat16"),
        (
            {"quantization": "fp8", "batch_invariant": True},
            "DLLM_BATCH_INVARIANT: .*DLLM_QUANTIZATION",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(settings: dict[str, object], message: str) -> None:
    """Impossible combinations of settings are rejected by name."""
    with pytest.raises(InvalidConfig, match=message):
        EngineConfig(model_path=Path(), **settings)  # type: ignore[arg-type]


def test_a_missing_library_says_what_to_install(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing torchao is reported with the command to install it, only if quantisation is on."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    LLM(checkpoint)
    for kind in KINDS:
        with pytest.raises(InvalidConfig, match=r"DLLM_QUANTIZATION: .*dllm-serve\[quantization\]"):
            LLM(checkpoint, quantization=kind)
