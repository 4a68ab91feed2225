"""Look at a checkpoint before minutes go into loading it."""

import json
import os
import re
import shlex
import struct
from pathlib import Path
from typing import Any

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
        raise CheckpointError(
            f"{model}: not on this machine; fetch it with: hf download {model} "
            "(the command comes with: pip install huggingface_hub)"
        )
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
    snapshot = folder / "snapshots" / reference.read_text(errors="replace").strip()
    return snapshot if snapshot.is_dir() else None


def size_of(directory: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def incomplete_files(directory: Path) -> list[str]:
    """What is wrong with a checkpoint's files, one by one; nothing is loaded."""
    problems = _incomplete_weights(directory)
    tokenizer = directory / "tokenizer.json"
    if tokenizer.is_file():
        try:
            json.loads(tokenizer.read_bytes())
        except (ValueError, RecursionError):
            problems.append(f"{tokenizer.name} is no JSON: not downloaded, or a Git LFS pointer")
    return problems


def _incomplete_weights(directory: Path) -> list[str]:
    """What is wrong with the files of weights.

    Each file that the index names must be there, hold the tensors that the index puts into it,
    and be as long as its header says, which a download that broke off is not.
    """
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return _incomplete(directory / "model.safetensors", None)
    try:
        placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        by_file: dict[str, set[str]] = {}
        for tensor, name in placed.items():
            by_file.setdefault(str(directory / name), set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        by_file = {}
    if not by_file:
        return [f"{index.name} is not an index of tensors"]
    return [
        problem
        for name, tensors in sorted(by_file.items())
        for problem in _incomplete(Path(name), tensors)
    ]


def _incomplete(file: Path, expected: set[str] | None) -> list[str]:
    """What is wrong with one file of weights, which should hold the `expected` tensors."""
    if not file.is_file():
        return [f"{file.name} is missing"]
    size = file.stat().st_size
    try:
        header, begin = _read_header(file)
        end = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return [f"{file.name} has no header of safetensors: not downloaded, or a Git LFS pointer"]
    if size != end:
        return [f"{file.name} has {size:,} bytes, its header says {end:,}"]
    missing = sorted((expected or set()) - header.keys())
    return [f"{file.name} has no tensor {missing[0]}"] if missing else []


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The tensors in a file of safetensors by name, and where their data begins.

    The format: the header's length in 8 bytes, the header as JSON, the data
    (https://huggingface.co/docs/safetensors).
    """
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > file.stat().st_size:
            raise ValueError("longer than the file")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


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
