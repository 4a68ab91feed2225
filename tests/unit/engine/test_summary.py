"""What the engine tells about its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from dllm_engine import ModelSummary
from dllm_engine.models.loader import read_spec
from safetensors import safe_open

from tests.support.checkpoints import write_dream, write_llada
from tests.support.family_checkpoints import FAMILIES, write_family

DEMO = Path(__file__).parents[3] / "model_repository/dllm/1"


def parameters_in(directory: Path) -> int:
    """The numbers in a checkpoint's files."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize(
    ("checkpoint", "family", "architecture"),
    [
        ("demo_checkpoint", "llada", "LLaDAModelLM"),
        ("demo_checkpoint_dream", "dream", "DreamModel"),
    ],
)
def test_summary_of_the_demo_checkpoints(checkpoint: str, family: str, architecture: str) -> None:
    """Name, family and sizes are those of the files."""
    spec = read_spec(DEMO / checkpoint)
    assert ModelSummary.of(DEMO / checkpoint, spec) == ModelSummary(
        checkpoint=checkpoint,
        family=family,
        architecture=architecture,
        num_parameters=parameters_in(DEMO / checkpoint),
        max_model_len=spec.max_model_len,
        mask_token_id=spec.mask_token_id,
        block_length=None,
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_are_counted_once(tmp_path: Path, ranks: int) -> None:
    """A tied head and a split over ranks change no count."""
    for name, write, tying in (
        ("llada", write_llada, {"weight_tying": True}),
        ("dream", write_dream, {"tie_word_embeddings": True}),
    ):
        directory = write(tmp_path / name, **tying)
        spec = read_spec(directory).split(ranks)
        assert ModelSummary.of(directory, spec).num_parameters == parameters_in(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_summary(tmp_path: Path, family: str) -> None:
    """It has the family's name, and the length of blocks where a model is block-wise."""
    directory = write_family(tmp_path, family)
    spec = read_spec(directory)
    summary = ModelSummary.of(directory, spec)
    assert summary.family == family
    assert summary.block_length == (spec.blocks.block_length if spec.blocks else None)


@pytest.mark.parametrize(
    ("name", "told"), [("modèle", "modèle"), ("mod\udcc3\udca8le", "modèle"), ("\udcff", "\ufffd")]
)
def test_the_name_is_text_whatever_the_interpreter_decodes(name: str, told: str) -> None:
    """Bytes that an interpreter without UTF-8 could not decode are decoded; others are replaced."""
    spec = read_spec(DEMO / "demo_checkpoint")
    assert ModelSummary.of(Path(name), spec).checkpoint == told
