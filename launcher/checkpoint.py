"""Look at a checkpoint before minutes go into loading it."""

import re
import shlex
from pathlib import Path

from launcher.errors import CheckpointError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")
#: `owner/name`, as the Hugging Face Hub names a model.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_checkpoint(path: str) -> None:
    """Raises CheckpointError, which says what to do, if the directory cannot be served."""
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"MODEL_PATH={path}: {_not_a_directory(path)}")
    missing = []
    if not (directory / "config.json").is_file():
        missing.append("config.json")
    for names in (WEIGHTS, TOKENIZERS):
        if not any((directory / name).is_file() for name in names):
            missing.append(" or ".join(names))
    if missing:
        raise CheckpointError(
            f"MODEL_PATH={path}: this directory has no {', no '.join(missing)}; "
            "it should be a checkpoint in its Hugging Face layout"
        )


def _not_a_directory(path: str) -> str:
    if Path(path).exists():
        return "this is a file; name the directory that holds config.json and the weights"
    if not HUB_ID.fullmatch(path):
        return "no such directory"
    folder = path.partition("/")[2]
    return (
        "no such directory. To serve this model of the Hugging Face Hub, download it: "
        f"hf download {path} --local-dir {folder}; then set MODEL_PATH={shlex.quote(folder)}"
    )
