"""What the launcher says of a checkpoint before it starts anything."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.checkpoint import check_checkpoint, find_checkpoint, incomplete_files
from launcher.errors import CheckpointError
from launcher.program import app
from launcher.settings import Settings
from tests.support.checkpoints import write_llada

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
    (folder / "refs/main").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="fetch it with"):
        find_checkpoint("owner/name")
    (folder / "refs/main").write_text("abc")
    with pytest.raises(CheckpointError, match="no config.json"):
        find_checkpoint("owner/name")
    for name in FILES:
        (snapshot / name).touch()
    assert find_checkpoint("owner/name") == snapshot
    assert find_checkpoint(str(snapshot)) == snapshot


def test_a_whole_checkpoint_has_no_problems(tmp_path: Path) -> None:
    """Neither in one file nor in several."""
    assert incomplete_files(write_llada(tmp_path / "one")) == []
    assert incomplete_files(write_llada(tmp_path / "three", shards=3)) == []


def test_what_a_broken_download_lacks_is_named(tmp_path: Path) -> None:
    """A file that is absent, short, a pointer, or without its tensors; all files are looked at."""
    folder = write_llada(tmp_path, shards=4)
    first, second, third, fourth = sorted(folder.glob("*.safetensors"))
    first.unlink()
    size = second.stat().st_size
    with second.open("r+b") as stream:
        stream.truncate(size - 5)
    third.write_text("version https://git-lfs.github.com/spec/v1\n")
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text())
    placed["weight_map"]["extra"] = fourth.name
    index.write_text(json.dumps(placed))
    assert incomplete_files(folder) == [
        f"{first.name} is missing",
        f"{second.name} has {size - 5:,} bytes, its header says {size:,}",
        f"{third.name} has no header of safetensors: not downloaded, or a Git LFS pointer",
        f"{fourth.name} has no tensor extra",
    ]
    for text in ("[]", '{"weight_map": {}}', '{"weight_map": {"a": 5}}', "[" * 100_000):
        index.write_text(text)
        assert incomplete_files(folder) == [f"{index.name} is not an index of tensors"]
    index.unlink()
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text('{"version": ')
    assert incomplete_files(folder) == [
        "model.safetensors is missing",
        "tokenizer.json is no JSON: not downloaded, or a Git LFS pointer",
    ]
    tokenizer.unlink()
    for header in (b'{"a": {"data_offsets": []}}', b"[" * 100_000):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        (problem,) = incomplete_files(folder)
        assert "no header of safetensors" in problem


def test_pull_tells_how_to_get_a_checkpoint_and_whether_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1 and a command to run, until the checkpoint is here and whole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    outcome = CliRunner().invoke(app, ["pull", "owner/name"])
    assert outcome.exit_code == 1
    assert "fetch it with: hf download owner/name" in outcome.stderr

    folder = shutil.copytree(
        Settings().model_repository / "dllm/1/demo_checkpoint", tmp_path / "owner/name"
    )
    outcome = CliRunner().invoke(app, ["pull", "owner/name", "--json"])
    size = (folder / "model.safetensors").stat().st_size
    expected = {"path": str(folder), "bytes": size, "architecture": "LLaDAModelLM"}
    assert json.loads(outcome.stdout) == expected

    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(100_000)
    outcome = CliRunner().invoke(app, ["pull", "owner/name"])
    assert outcome.exit_code == 1
    assert "has 100,000 bytes" in outcome.stderr
    assert "fetch it again: hf download owner/name" in outcome.stderr

    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x" * 300}})
    )
    outcome = CliRunner().invoke(app, ["pull", "owner/name"])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (1, 1)
    assert "File name too long" in outcome.stderr


def test_inspect_prints_what_the_engine_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, and a row for this machine and each card, under the environment's settings."""
    monkeypatch.setenv("DLLM_MAX_NUM_SEQS", "5")
    checkpoint = Settings().model_repository / "dllm/1/demo_checkpoint"
    outcome = CliRunner().invoke(app, ["inspect", str(checkpoint)], env={"COLUMNS": "120"})
    assert outcome.exit_code == 0
    assert "architecture  LLaDAModelLM" in outcome.stdout
    rows = [line.split("│") for line in outcome.stdout.splitlines() if line.startswith("│")]
    assert rows[0][1].strip() == "here: cpu"
    assert {row[4].strip() for row in rows} == {"10"}
    assert any("H200" in row[1] for row in rows)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.exit('config.json: architecture GPT2; supported: LLaDAModelLM')", "supported: LLaDA"),
        ("import no_torch", "pip install 'dllm-serve[engine]'"),
    ],
)
def test_inspect_refuses_in_the_engines_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    """What the engine of the model repository says is one line; so is that it is not installed."""
    engine = tmp_path / "dllm/1/dllm_engine"
    engine.mkdir(parents=True)
    (engine / "__init__.py").touch()
    (engine / "describe.py").write_text(f"import sys\n{code}\n")
    monkeypatch.setenv("DLLM_MODEL_REPOSITORY", str(tmp_path))
    for name in FILES:
        (tmp_path / name).touch()
    outcome = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert said in outcome.stderr
    assert outcome.stderr.count("\n") == 1
