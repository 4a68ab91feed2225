"""Reads the JSON files of a checkpoint directory, and finds the mask token in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_engine.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Like `read_json`; empty if there is no such file."""
    return read_json(path) if path.exists() else {}


def find_mask_token(
    directory: Path, config: Mapping[str, Any], name: str | None, published: int | None
) -> int | None:
    """Return the id of the mask token; None if nothing tells it.

    The first of these applies: `mask_token_id` of config.json, the tokenizer's own mask token, the
    tokenizer's token with the family's name for it, the published id.

    Args:
        directory: the checkpoint.
        config: its config.json.
        name: the family's name of the token, if known.
        published: the id in the family's published checkpoints, if config.json does not hold it.

    Raises:
        CheckpointError: config.json and the tokenizer disagree.
    """
    given: int | None = config.get("mask_token_id")
    settings = read_json_if_there(directory / "tokenizer_config.json")
    declared = settings.get("mask_token")
    if isinstance(declared, dict):
        declared = declared.get("content")
    for token in (declared, name):
        found = _token_id(directory, settings, token) if token else None
        if found is None:
            continue
        if given not in (None, found):
            raise CheckpointError(
                f"config.json: mask_token_id: {given}, but the tokenizer's {token} is {found}"
            )
        return found
    return published if given is None else given


def _token_id(directory: Path, settings: Mapping[str, Any], token: str) -> int | None:
    """Id of a token, by the tokenizer's files; None if they do not name it."""
    # First: the added_tokens.json of SDAR spells its mask in another way.
    for index, entry in settings.get("added_tokens_decoder", {}).items():
        if entry["content"] == token:
            return int(index)
    whole = read_json_if_there(directory / "tokenizer.json")
    for entry in whole.get("added_tokens", []):
        if entry["content"] == token:
            return int(entry["id"])
    added = read_json_if_there(directory / "added_tokens.json").get(token)
    return None if added is None else int(added)
