"""Add models to a model repository: folders of their own that share the engine's code."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from launcher.errors import RepositoryError, SettingError

ENGINE, UNARY = "dllm", "dllm_unary"
#: Names that are safe in paths, URLs and lists.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
PARAMETERS = re.compile(r"^parameters \[.*?^\]\n", re.MULTILINE | re.DOTALL)
KEY = re.compile(r'key: "(\w+)"')


def add_model(
    repository: Path, name: str, checkpoint: str, settings: Mapping[str, str] | None = None
) -> list[Path]:
    """Make the folders NAME and NAME_unary in a repository; returns them.

    Each has a config.pbtxt of its own and a link to the code beside it, so nothing is copied. In
    the configuration stand the checkpoint and the given `settings`, which come before environment
    variables; those are for all models.

    Raises RepositoryError if the name cannot be used, and SettingError for an unknown setting.
    """
    if not NAME.fullmatch(name) or name.endswith("_unary"):
        raise RepositoryError(
            f"{name!r} cannot name a model: use up to 63 of A-Z a-z 0-9 . _ -, "
            "with a letter or digit first, and not _unary last"
        )
    folders = [repository / name, repository / f"{name}_unary"]
    for source in (ENGINE, UNARY):
        if not (repository / source / "config.pbtxt").is_file():
            raise RepositoryError(
                f"model repository {repository} has no model {source!r}: "
                "set DLLM_MODEL_REPOSITORY to the folder that holds it"
            )
    for folder in folders:
        if folder.exists():
            raise RepositoryError(f"{folder} is there already; remove it or choose another name")
    engine = (repository / ENGINE / "config.pbtxt").read_text(encoding="utf-8")
    _check_names(settings or {}, KEY.findall(engine))
    parameters = {"CONFIG_FIRST": "on", "MODEL_PATH": checkpoint, **(settings or {})}
    _make(folders[0], ENGINE, _with_parameters(engine, parameters))
    unary = (repository / UNARY / "config.pbtxt").read_text(encoding="utf-8")
    _make(
        folders[1], UNARY, unary.replace(f'string_value: "{ENGINE}"', f"string_value: {_q(name)}")
    )
    return folders


def _check_names(settings: Mapping[str, str], known: list[str]) -> None:
    for name in settings:
        if name not in known or name == "MODEL_PATH":
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
            raise SettingError(f"{name} is not a setting of one engine{hint}")


def _with_parameters(config: str, parameters: Mapping[str, str]) -> str:
    rows = [
        f"  {{ key: {_q(key)} value {{ string_value: {_q(parameters[key])} }} }}"
        for key in parameters
    ]
    return PARAMETERS.sub(lambda _: "parameters [\n" + ",\n".join(rows) + "\n]\n", config)


def _q(text: str) -> str:
    """The text as a string of a Protocol Buffers text file."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _make(folder: Path, source: str, config: str) -> None:
    folder.mkdir()
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    # Relative, so that it also leads there where the repository is mounted.
    (folder / "1").symlink_to(Path("..") / source / "1", target_is_directory=True)
