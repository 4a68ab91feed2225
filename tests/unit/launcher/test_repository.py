"""`dllm-serve add`: a further model in a repository."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import RepositoryError, SettingError
from launcher.repository import add_model

ROOT = Path(__file__).parents[3]
DREAM = ROOT / "model_repository/dllm/1/demo_checkpoint_dream"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with our two models."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("dllm", "dllm_unary"):
        (folder / name).symlink_to(ROOT / "model_repository" / name)
    return folder


def test_a_model_gets_folders_that_share_the_code(repository: Path) -> None:
    """Two folders with their own configuration and a relative link to the code."""
    made = add_model(repository, "dream", '/with "quotes"', {"DLLM_CACHE": "dual"})
    assert made == [repository / "dream", repository / "dream_unary"]
    assert (made[0] / "1").readlink() == Path("../dllm/1")
    assert (made[1] / "1").readlink() == Path("../dllm_unary/1")
    config = (made[0] / "config.pbtxt").read_text()
    original = (repository / "dllm/config.pbtxt").read_text()
    assert config.partition("parameters [")[0] == original.partition("parameters [")[0]
    assert config.partition("parameters [")[2].split("\n")[1:-2] == [
        '  { key: "CONFIG_FIRST" value { string_value: "on" } },',
        '  { key: "MODEL_PATH" value { string_value: "/with \\"quotes\\"" } },',
        '  { key: "DLLM_CACHE" value { string_value: "dual" } }',
    ]
    unary = (made[1] / "config.pbtxt").read_text()
    assert '{ key: "ENGINE_MODEL"   value { string_value: "dream" } }' in unary


@pytest.mark.parametrize("name", ["", "a/b", "..", "x_unary", "é", "-x"])
def test_names_that_cannot_work_are_refused(repository: Path, name: str) -> None:
    """A name has to work in paths and URLs."""
    with pytest.raises(RepositoryError, match="cannot name a model"):
        add_model(repository, name, "/x")


def test_nothing_is_overwritten(repository: Path) -> None:
    """A model that is there stays as it is."""
    with pytest.raises(RepositoryError, match="dllm is there already"):
        add_model(repository, "dllm", "/x")
    (repository / "new_unary").mkdir()
    with pytest.raises(RepositoryError, match="new_unary is there already"):
        add_model(repository, "new", "/x")
    assert not (repository / "new").exists()


def test_unknown_settings_are_named(repository: Path) -> None:
    """A misspelt setting is refused before anything is made."""
    with pytest.raises(
        SettingError, match="DLLM_CAHCE is not a setting .* did you mean DLLM_CACHE"
    ):
        add_model(repository, "x", "/x", {"DLLM_CAHCE": "dual"})
    assert not (repository / "x").exists()


def test_the_command_asks_the_engine_first(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that the engine would refuse is told in its words, and nothing is made."""
    monkeypatch.setenv("DLLM_MODEL_REPOSITORY", str(repository))
    command = ["add", "dream", str(DREAM), "--set"]
    refused = CliRunner().invoke(app, [*command, "DLLM_MAX_NUM_SEQS=none"])
    assert (refused.exit_code, (repository / "dream").exists()) == (1, False)
    assert "DLLM_MAX_NUM_SEQS" in refused.stderr
    made = CliRunner().invoke(app, [*command, "DLLM_MAX_NUM_SEQS=2"])
    assert made.exit_code == 0, made.stderr
    assert "DreamModel" in made.stdout
    assert str(DREAM) in (repository / "dream/config.pbtxt").read_text()
