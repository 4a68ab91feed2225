"""What the launcher says of a checkpoint before it starts anything."""

from pathlib import Path

import pytest

from launcher.checkpoint import check_checkpoint, find_checkpoint
from launcher.errors import CheckpointError

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def test_a_hub_id_is_answered_with_the_command_that_downloads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a model on the Hugging Face Hub is no directory; one of that name is."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint("GSAI-ML/LLaDA-8B-Instruct")
    message = str(caught.value)
    assert "\n" not in message
    assert "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir LLaDA-8B-Instruct" in message
    assert "MODEL_PATH=LLaDA-8B-Instruct" in message
    folder = tmp_path / "GSAI-ML/LLaDA-8B-Instruct"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).touch()
    check_checkpoint("GSAI-ML/LLaDA-8B-Instruct")


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    """The message names the directory and the file that it lacks."""
    for name in FILES:
        (tmp_path / name).touch()
    check_checkpoint(str(tmp_path))
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"MODEL_PATH={tmp_path}: .* has no {missing}"):
        check_checkpoint(str(tmp_path))


def test_files_and_nothing_are_no_checkpoints(tmp_path: Path) -> None:
    """A file, such as the weights, and a path that leads nowhere are told apart."""
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="this is a file; name the directory"):
        check_checkpoint(str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="no such directory$"):
        check_checkpoint(str(tmp_path / "nowhere"))


def test_a_hub_id_is_found_where_it_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dllm serve OWNER/NAME` takes the snapshot that `hf download` fetched, and fetches none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="fetch it with: hf download owner/name"):
        find_checkpoint("owner/name")
    folder = tmp_path / "hub/models--owner--name"
    snapshot = folder / "snapshots/abc"
    for directory in (folder / "refs", snapshot):
        directory.mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    with pytest.raises(CheckpointError, match="no config.json"):
        find_checkpoint("owner/name")
    for name in FILES:
        (snapshot / name).touch()
    assert find_checkpoint("owner/name") == snapshot
    assert find_checkpoint(str(snapshot)) == snapshot
