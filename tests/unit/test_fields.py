"""A sampling field is written once, in the engine's `SamplingParams`."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dllm_client import Sampling as ClientSampling
from dllm_engine import InvalidRequest, SamplingParams
from dllm_engine.sampling_params import FIELDS, Field, param, table
from pydantic import ValidationError

from adapter.api.openai.requests import CompletionCall
from adapter.api.schemas import Denoising, Sampling
from adapter.engine.tensors import INPUT_TYPES
from tools import fields

ROOT = Path(__file__).parents[2]
FILES = pytest.mark.parametrize("path", fields.WRITERS)
#: Inputs of the models that are no sampling fields.
PROMPTS = {"text_input", "messages", "tools", "input_ids", "suffix", "canvas_ids"}
PROMPTS |= {"priority", "cache_salt"}
PROMPTS |= {"decide", "score"}
CONTROLS = {"exclusive", "stream", "stream_interval", "check", "cancel", "describe"}
GAP = {"suffix", "canvas_ids"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoreParams(SamplingParams):
    """A table with one field more."""

    warmth: float | None = param(None, "how warm", ge=0, le=9)


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def config_inputs(model: str) -> set[str]:
    """Names of a Triton model's inputs."""
    inputs = text_of(f"model_repository/{model}/config.pbtxt").partition("output [")[0]
    return set(re.findall(r'name: "(\w+)"', inputs))


@FILES
def test_every_list_of_fields_is_made_from_the_table(path: str) -> None:
    """Each file holds what `make fields` writes, so a difference names the file."""
    made = fields.written(path, text_of(path))
    difference = "\n".join(difflib.unified_diff(text_of(path).split("\n"), made.split("\n")))
    assert not difference, f"{path} differs from dllm_engine/sampling_params.py: run `make fields`"


@FILES
def test_a_field_of_the_table_alone_is_found_missing(path: str) -> None:
    """A field added to `SamplingParams` makes every file out of date until it is written there."""
    made = fields.written(path, text_of(path), table(MoreParams))
    new = [line for line in made.split("\n") if line not in text_of(path).split("\n")]
    assert any("warmth" in line for line in new)


@FILES
def test_a_field_of_one_file_alone_is_found(path: str) -> None:
    """A field added to one list by hand makes that file out of date."""
    changed = text_of(path).replace("pool_kernel", "pool_width")
    assert fields.written(path, changed) == text_of(path) != changed


def test_the_worked_example_works(tmp_path: Path) -> None:
    """A field that is added as docs/fields.md says reaches every file by `make fields` alone."""
    for name in ("adapter", "client", "tools", "model_repository/dllm/1/dllm_engine"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*fields.WRITERS, "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    example = re.search(
        r'^   ```python\n   # (\S+), above "(.+)"\n(.+?)^   ```$',
        text_of("docs/fields.md"),
        re.M | re.S,
    )
    assert example is not None
    file = tmp_path / example[1]
    declared = re.sub("^   ", "", example[3], flags=re.M) + example[2]
    file.write_text(file.read_text().replace(example[2], declared))

    folders = [tmp_path / name for name in ("model_repository/dllm/1", "client", ".")]
    run = subprocess.run(
        [sys.executable, "-m", "tools.fields"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split("\n")[:-1] == [f"wrote {path}" for path in fields.WRITERS], run.stderr
    assert all("min_p" in (tmp_path / path).read_text() for path in fields.WRITERS)


@pytest.mark.parametrize(
    ("place", "names"),
    [
        (
            "model_repository/dllm/config.pbtxt",
            config_inputs("dllm") - PROMPTS - CONTROLS,
        ),
        (
            "model_repository/dllm_unary/config.pbtxt",
            config_inputs("dllm_unary") - PROMPTS,
        ),
        (
            "adapter/engine/tensors.py: INPUT_TYPES",
            INPUT_TYPES.keys() - PROMPTS - CONTROLS,
        ),
        ("adapter/api/schemas.py: Sampling", set(Sampling.model_fields)),
        (
            "adapter/api/openai/requests.py: Call",
            (CompletionCall.model_fields.keys() & FIELDS.keys()) | {"gen_length"},
        ),
        (
            "client/dllm_client/_types.py: Sampling",
            typing.get_type_hints(ClientSampling).keys() - GAP,
        ),
    ],
)
def test_every_place_has_exactly_the_fields(place: str, names: set[str]) -> None:
    """No place has a field that the table lacks, and none lacks one."""
    assert set(names) == set(FIELDS), place


def test_openai_bodies_have_the_fields_of_the_rest_api() -> None:
    """OpenAI calls take each field under its own name, except the length: `max_tokens`."""
    assert Denoising.model_fields.keys() < CompletionCall.model_fields.keys()
    assert FIELDS.keys() - Denoising.model_fields.keys() == {"temperature", "gen_length"}


def edge_values(field: Field) -> list[Any]:
    """Values on both sides of each limit of a field."""
    limits = field.limits
    if limits.max_items:
        long = ["x" * limits.max_chars, "x" * (limits.max_chars + 1), ""]
        return [
            ["x"] * limits.max_items,
            ["x"] * (limits.max_items + 1),
            *([text] for text in long),
        ]
    bounds = [bound for bound in (limits.ge, limits.gt, limits.le) if bound is not None]
    values: list[Any] = [bound + change for bound in bounds for change in (-1, 0, 1)]
    if field.type is float:
        values = [float(value) for value in values] + [float("nan"), float("inf"), 0.5]
    return values


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda field: field.name)
def test_both_doors_have_the_same_limits(field: Field) -> None:
    """The REST API refuses a value if and only if the engine does; only odd is the engine's."""
    for value in edge_values(field):
        engine = accepts(lambda value=value: field.limits.check(field.name, value))
        api = accepts(lambda value=value: Sampling.model_validate({field.name: value}))
        assert engine == api or field.limits.odd, value


def accepts(check: Callable[[], object]) -> bool:
    """Whether the check raises nothing."""
    try:
        check()
    except (InvalidRequest, ValidationError):
        return False
    return True


def test_fields_have_a_type_of_triton_that_holds_their_values() -> None:
    """An integer has 64 bits, so that the engine sees values out of range; stop is a list."""
    kinds = {name: fields.triton_type(field) for name, field in FIELDS.items()}
    assert kinds["seed"] == "INT64"
    assert [name for name, field in FIELDS.items() if field.is_list] == ["stop"]
    assert (kinds["temperature"], kinds["steps"], kinds["credit"]) == ("FP32", "INT64", "BOOL")
    assert (kinds["alg"], kinds["stop"]) == ("BYTES", "BYTES")
