"""Checkpoints are read completely from their real layouts, or rejected."""

import json
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dllm_engine import LLM, CheckpointError
from dllm_engine.models.loader import load_model, read_spec
from dllm_engine.ops.layout import PackedLayout
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import EOS, write_dream, write_llada
from tests.support.oracle import dream_oracle, llada_oracle
from tests.support.reference import Forward

#: Of the weights, where logits are compared: they are a few units large then, and
#: float32 has digits left for an absolute difference of 1e-5.
SCALE = 0.08


def _logits(directory: Path, lengths: list[int], tokens: torch.Tensor) -> torch.Tensor:
    model = load_model(directory, read_spec(directory), device="cpu", dtype=torch.float32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.inference_mode():
        hidden = model(tokens, positions, PackedLayout.of(lengths))
        return model.head.all_logits(model.head_input(hidden))


@pytest.mark.parametrize(
    "layout",
    [
        {"shards": 1},
        {"shards": 4},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "shards": 2},
        {"weight_tying": True},
        {"n_kv_heads": 4},
        {"n_kv_heads": 1, "rope_theta": 500000.0},
    ],
    ids=str,
)
def test_logits_equal_transformers_llama(tmp_path: Path, layout: dict[str, object]) -> None:
    """Packed logits equal those of transformers' Llama with a full mask, sequence by sequence."""
    directory = write_llada(tmp_path, scale=SCALE, **layout)  # type: ignore[arg-type]
    assert_logits_equal(directory, llada_oracle(directory, torch.float32))


@pytest.mark.parametrize(
    "layout",
    [
        {"shards": 1},
        {"shards": 3, "dtype": torch.bfloat16},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1, "rope_theta": 10000.0},
    ],
    ids=str,
)
def test_dream_logits_equal_transformers_qwen2(tmp_path: Path, layout: dict[str, object]) -> None:
    """Packed logits equal those of transformers' Qwen2 with a full mask, before the shift."""
    directory = write_dream(tmp_path, scale=SCALE, **layout)  # type: ignore[arg-type]
    assert_logits_equal(directory, dream_oracle(directory, torch.float32), shifted=True)


def assert_logits_equal(directory: Path, oracle: Forward, *, shifted: bool = False) -> None:
    """Compare four packed sequences with the oracle: no logit differs by more than 1e-5."""
    lengths = [1, 17, 17, 40]
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 512, (sum(lengths),), generator=generator)
    packed = _logits(directory, lengths, tokens).split(lengths)
    for sequence, logits in zip(tokens.split(lengths), packed, strict=True):
        expected = oracle(sequence)
        assert 1 < expected.abs().max() < 10
        moved = torch.cat([logits[:1], logits[:-1]]) if shifted else logits
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def _edit_tensors(directory: Path, edit: dict[str, torch.Tensor | None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, value in edit.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path)


def _load(directory: Path) -> None:
    load_model(directory, read_spec(directory), device="cpu", dtype=torch.float32)


def test_every_missing_and_unexpected_tensor_is_named(tmp_path: Path) -> None:
    """A checkpoint with missing or unexpected tensors is rejected with all their names."""
    write_llada(tmp_path)
    gone = "model.transformer.blocks.1.up_proj.weight"
    _edit_tensors(tmp_path, {gone: None, "model.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"missing {gone}.*unexpected model.extra"):
        _load(tmp_path)


def test_however_many_are_missing_all_are_named(tmp_path: Path) -> None:
    """The error names every missing tensor, however many there are."""
    write_llada(tmp_path)
    names = [n for n in load_file(tmp_path / "model.safetensors") if "blocks" in n]
    extra = {f"model.extra.{i}": torch.zeros(1) for i in range(30)}
    _edit_tensors(tmp_path, dict.fromkeys(names) | extra)
    with pytest.raises(CheckpointError) as raised:
        _load(tmp_path)
    assert all(f"missing {name}" in str(raised.value) for name in names)
    assert all(f"unexpected {name}" in str(raised.value) for name in extra)


def test_all_that_is_wrong_with_the_tensors_is_one_error(tmp_path: Path) -> None:
    """One error names every missing and unexpected tensor and every wrong shape and type."""
    write_llada(tmp_path)
    block = "model.transformer.blocks"
    _edit_tensors(
        tmp_path,
        {
            f"{block}.0.q_proj.weight": None,
            f"{block}.7.q_proj.weight": torch.zeros(64, 64),
            f"{block}.1.attn_out.weight": torch.zeros(64, 32),
            f"{block}.1.ff_out.weight": torch.zeros(64, 96, dtype=torch.int8),
            f"{block}.1.up_proj.weight": torch.zeros(64, 96, dtype=torch.int8),
        },
    )
    with pytest.raises(CheckpointError) as raised:
        _load(tmp_path)
    problems = str(raised.value).split(": tensors: ")[1].split("; ")
    assert sorted(problems) == [
        f"missing {block}.0.q_proj.weight",
        f"{block}.1.attn_out.weight: shape [64, 32], expected [64, 64]",
        f"{block}.1.ff_out.weight: I8, expected one of BF16, F16, F32, F64",
        f"{block}.1.up_proj.weight: I8, expected one of BF16, F16, F32, F64",
        f"{block}.1.up_proj.weight: shape [64, 96], expected [96, 64]",
        f"unexpected {block}.7.q_proj.weight",
    ]


@pytest.mark.parametrize(
    "weight_map", [None, {}, [], "x", {"a": 1}, {"a": ["model.safetensors"]}, {"a": None}], ids=str
)
def test_a_malformed_index_is_an_error_with_its_path(tmp_path: Path, weight_map: object) -> None:
    """An index whose `weight_map` does not map names to files is rejected with its path."""
    write_llada(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map: must map tensor names"):
        _load(tmp_path)


def test_an_index_that_names_a_missing_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    """A missing shard is reported with its path."""
    write_llada(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        _load(tmp_path)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_shapes_that_only_add_up_are_refused(tmp_path: Path, family: str) -> None:
    """Each of several stacked projections must have its own shape; the right sum is not enough."""
    write = {"llada": write_llada, "dream": write_dream}[family]
    write(tmp_path)  # type: ignore[operator]
    layer = {"llada": "model.transformer.blocks.1", "dream": "model.layers.1.self_attn"}[family]
    query, key = f"{layer}.q_proj.weight", f"{layer}.k_proj.weight"
    _edit_tensors(tmp_path, {query: torch.zeros(32, 64), key: torch.zeros(64, 64)})
    with pytest.raises(CheckpointError) as raised:
        _load(tmp_path)
    assert f"{query}: shape [32, 64], expected [64, 64]" in str(raised.value)
    assert f"{key}: shape [64, 64], expected [32, 64]" in str(raised.value)


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    """Weights that need scales are rejected by name."""
    write_llada(tmp_path)
    name = "model.transformer.blocks.0.up_proj.weight"
    _edit_tensors(tmp_path, {name: torch.zeros(96, 64, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=f"{name}: I8, expected one of BF16, F16, F32"):
        _load(tmp_path)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    """Python files that config and tokenizer refer to are never imported."""
    write_dream(tmp_path)
    for name in ("modeling_dream", "configuration_dream", "tokenization_dream"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('remote code was run')")
    engine = LLM(tmp_path).engine
    assert engine.tokenizer is not None
    assert not [name for name in sys.modules if "_dream" in name and "transformers_modules" in name]


#: Says when the engine is there, loads, and says when it is done.
_LOAD = """
import sys, torch
from pathlib import Path
from dllm_engine.models.loader import load_model, read_spec
torch.set_num_threads(1)
directory = Path(sys.argv[1])
spec = read_spec(directory)
torch.mm(torch.ones(8, 8), torch.ones(8, 8))
print("ready", flush=True)
sys.stdin.readline()
model = load_model(directory, spec, device="cpu", dtype=torch.float32)
print("loaded", flush=True)
sys.stdin.readline()
"""


def _anonymous(pid: int) -> int:
    """Bytes of a process's own memory, without pages of mapped files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_a_model_never_exists_twice_in_memory(tmp_path: Path) -> None:
    """While weights are read, converted and packed, the process takes little more than their
    bytes."""
    write_llada(
        tmp_path,
        tokenizer=False,
        dtype=torch.bfloat16,
        shards=3,
        d_model=512,
        n_layers=12,
        n_heads=8,
        n_kv_heads=8,
        mlp_hidden_size=1536,
    )
    weights = 4 * read_spec(tmp_path).weight_bytes(1)
    assert weights > 150 * 2**20
    command = [sys.executable, "-c", _LOAD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        before = peak = _anonymous(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while not select.select([child.stdout], [], [], 0.001)[0]:
            peak = max(peak, _anonymous(child.pid))
        assert child.stdout.readline() == "loaded\n"
        after = _anonymous(child.pid)
        child.stdin.write("end\n")
    assert after - before > 0.9 * weights
    assert peak - before < 1.3 * weights


def test_progress_goes_up_to_the_last_parameter(tmp_path: Path) -> None:
    """Every parameter is reported once, in order, with the total."""
    write_dream(tmp_path)
    seen: list[tuple[int, int]] = []
    spec = read_spec(tmp_path)
    load_model(
        tmp_path, spec, device="cpu", dtype=torch.float32, progress=lambda *at: seen.append(at)
    )
    total = seen[-1][1]
    assert seen == [(i + 1, total) for i in range(total)]
    assert total > spec.num_layers * 6


def test_progress_is_logged(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Loading logs its progress in ten lines, up to 100%."""
    with caplog.at_level("INFO", logger="dllm_engine"):
        LLM(checkpoint)
    percents = [int(found) for found in re.findall(r"loading weights (\d+)%", caplog.text)]
    assert percents == sorted(set(percents))
    assert len(percents) == 10
    assert percents[-1] == 100


def test_a_misshaped_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    """A tensor of the wrong shape is rejected with its name, its shape and the expected shape."""
    write_llada(tmp_path)
    name = "model.transformer.blocks.0.attn_out.weight"
    _edit_tensors(tmp_path, {name: torch.zeros(64, 32)})
    with pytest.raises(CheckpointError, match=r"attn_out.*\[64, 32\].*expected \[64, 64\]"):
        _load(tmp_path)


def test_a_truncated_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    """A damaged safetensors file is reported with its path."""
    write_llada(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _load(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    """A directory with only a pickle is rejected with the reason."""
    write_llada(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel; supported: LLaDAModelLM, DreamModel",
        ),
        ({"architectures": None}, "none given"),
        ({"d_model": None}, "d_model is missing"),
        ({"mask_token_id": None}, "mask_token_id is missing"),
        ({"layer_norm_type": "default"}, "layer_norm_type: only 'rms'"),
        ({"include_bias": True}, "include_bias: only False"),
        ({"d_model": "64"}, "d_model: must be a number, not text: '64'"),
        ({"n_layers": [2]}, r"num_layers: must be a number of at least 1, not \[2\]"),
        ({"n_heads": {}}, "config.json: unsupported operand"),
    ],
    ids=str,
)
def test_config_problems_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """A config of another architecture, or without a required field, is rejected by field name."""
    write_llada(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(CheckpointError, match=message):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: only None"),
        ({"use_sliding_window": True}, "use_sliding_window: only False"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "rope_parameters: only rope_type 'default' .* got 'yarn'",
        ),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
    ids=str,
)
def test_dream_config_problems_are_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """A Dream config with an unsupported or missing field is rejected by field name."""
    write_dream(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(CheckpointError, match=message):
        read_spec(tmp_path)


def test_dreams_context_is_what_it_was_trained_for(tmp_path: Path) -> None:
    """The context of Dream is the 2,048 positions it was trained for, not the 131,072 of its
    config."""
    write_dream(tmp_path, max_position_embeddings=131072)
    assert read_spec(tmp_path).max_model_len == 2048


def test_a_hub_id_is_answered_with_the_command_that_downloads_it() -> None:
    """A name of the Hugging Face Hub in the place of a directory is told as that."""
    with pytest.raises(CheckpointError) as caught:
        read_spec(Path("GSAI-ML/LLaDA-8B-Instruct"))
    command = "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir LLaDA-8B-Instruct"
    assert command in str(caught.value)


def test_a_missing_directory_and_broken_json_are_named(tmp_path: Path) -> None:
    """A directory or file that cannot be read is reported with its path."""
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        read_spec(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no config.json, neither model.safetensors nor"):
        read_spec(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_spec(tmp_path)


def test_stop_ids_come_from_both_configs(tmp_path: Path) -> None:
    """End-of-text ids of config.json and generation_config.json are joined."""
    write_llada(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 7]}))
    assert read_spec(tmp_path).eos_token_ids == (7, EOS)
