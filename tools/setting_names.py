"""Writes the list of all settings' names, and the two copies of the module that holds it.

    make fields

tests/unit/test_setting_names.py checks that the list and the copies are up to date.
"""

from pathlib import Path

from dllm_engine import EngineConfig

from adapter.settings import Settings as AdapterSettings
from launcher.settings import Settings as LauncherSettings
from tools.fields import BLOCK, formatted

ROOT = Path(__file__).parents[1]
SOURCE = "adapter/setting_names.py"
COPIES = ("launcher/setting_names.py", "model_repository/dllm/1/dllm_setting_names.py")
#: Read by the Triton model, the client and the Compose files.
OTHERS = {"EXIT_ON_ENGINE_DEATH", "URL", "API_KEY"}


def names() -> list[str]:
    """All settings without their prefix, sorted."""
    known = {name.upper() for s in (AdapterSettings, LauncherSettings) for name in s.model_fields}
    engine = {name.removeprefix("DLLM_") for name in EngineConfig.settings()} - {"MODEL_PATH"}
    return sorted(known | engine | OTHERS)


def written(text: str) -> str:
    """The text of the module, with the names of today's settings."""
    made = "\n".join(f'    "{name}",' for name in names())
    return formatted(BLOCK.sub(lambda found: f"{found[1]}{made}", text))


def main() -> None:
    """Write the module and its copies where they are not up to date, and name them."""
    made = written((ROOT / SOURCE).read_text(encoding="utf-8"))
    for path in (SOURCE, *COPIES):
        if (ROOT / path).read_text(encoding="utf-8") != made:
            (ROOT / path).write_text(made, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
