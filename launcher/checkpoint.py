"""Look at a checkpoint before minutes go into loading it."""

import os
import re
import shlex
from pathlib import Path

from launcher.errors import CheckpointError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")
#: `owner/name`, as the Hugging Face Hub names a model.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_checkpoint(model: str) -> Path:
    """The directory of a checkpoint: a path, or a Hub id that `hf download` put into its cache.

    Nothing is fetched. Raises CheckpointError, which says how to get it, if it is not here.
    """
    if Path(model).exists() or not HUB_ID.fullmatch(model):
        check_checkpoint(model, model)
        return Path(model).resolve()
    snapshot = cached_snapshot(model)
    if snapshot is None:
        raise CheckpointError(f"{model}: not on this machine; fetch it with: hf download {model}")
    check_checkpoint(str(snapshot), str(snapshot))
    return snapshot


def cached_snapshot(hub_id: str) -> Path | None:
    """The newest snapshot of a model in the Hub's cache, where `hf download` puts it."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    reference = folder / "refs/main"
    if not reference.is_file():
        return None
    snapshot = folder / "snapshots" / reference.read_text().strip()
    return snapshot if snapshot.is_dir() else None


def check_checkpoint(path: str, given: str = "") -> None:
    """Raises CheckpointError, which says what to do, if the directory cannot be served.

    Its message begins with `given`, what names the directory; that is MODEL_PATH by default.
    """
    directory = Path(path)
    given = given or f"MODEL_PATH={path}"
    if not directory.is_dir():
        raise CheckpointError(f"{given}: {_not_a_directory(path)}")
    missing = []
    if not (directory / "config.json").is_file():
        missing.append("config.json")
    for names in (WEIGHTS, TOKENIZERS):
        if not any((directory / name).is_file() for name in names):
            missing.append(" or ".join(names))
    if missing:
        raise CheckpointError(
            f"{given}: this directory has no {', no '.join(missing)}; "
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
