"""Each part knows the names of all settings, so that it can tell a misspelt one."""

from pathlib import Path

from dllm_engine import EngineConfig

from adapter.setting_names import NAMES, misspelt
from adapter.settings import Settings as AdapterSettings
from launcher.settings import Settings as LauncherSettings

ROOT = Path(__file__).parents[2]
COPIES = [
    ROOT / "adapter/setting_names.py",
    ROOT / "launcher/setting_names.py",
    ROOT / "model_repository/dllm/1/dllm_setting_names.py",
]
#: Read elsewhere: by the Triton model, the client, and the Compose files.
OTHERS = {"EXIT_ON_ENGINE_DEATH", "URL", "API_KEY"}


def test_the_names_are_those_of_the_settings() -> None:
    """The list has every setting of launcher, adapter and engine, and nothing else."""
    known = {name.upper() for s in (AdapterSettings, LauncherSettings) for name in s.model_fields}
    known |= {name.removeprefix("DLLM_") for name in EngineConfig.settings()} - {"MODEL_PATH"}
    assert list(NAMES) == sorted(known | OTHERS)


def test_the_copies_are_the_same() -> None:
    """Launcher, adapter and Triton model, which import nothing of each other, agree."""
    assert len({path.read_text() for path in COPIES}) == 1


def test_a_misspelt_name_is_told_with_the_nearest_one() -> None:
    """Only names that begin with DLLM_ and that no part reads are told."""
    assert misspelt(["DLLM_CAHCE", "DLLM_CACHE", "PATH", "DLLM_QZX"]) == [
        "DLLM_CAHCE is not a setting and is ignored; did you mean DLLM_CACHE?",
        "DLLM_QZX is not a setting and is ignored; see docs/settings.md",
    ]
