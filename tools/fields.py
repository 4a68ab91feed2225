"""Writes every list of sampling fields from the engine's table, `SamplingParams`.

    make fields

A list stands in its file between the lines `make fields: begin` and `make fields: end`. Nothing
else in the file is touched. tests/unit/test_fields.py checks that each list is up to date.
"""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dllm_engine.decoding import COMMIT_FIELDS, REQUIRED_WITH
from dllm_engine.sampling_params import CACHE_FIELDS, FIELDS, Field

ROOT = Path(__file__).parents[1]
INT64_MAX = 2**63 - 1
#: The lines of a file between the two marks.
BLOCK = re.compile(r"(?<=make fields: begin)([^\n]*\n)(.*?)(?=\n[^\n]*make fields: end)", re.DOTALL)
#: The REST API knows these by settings too, and OpenAI's calls have fields of their own for them.
LIMITED_BY_SETTING = {"temperature": "DLLM_MAX_TEMPERATURE", "gen_length": "DLLM_MAX_GEN_LENGTH"}

#: The REST API's types for strings and objects, which have limits of their own.
REST_TYPES = {"str": "Name", "list[str]": "StopStrings", "dict[str, Any]": "StructuredOutputs"}

Table = Mapping[str, Field]
Writer = Callable[[Table], Iterator[str]]


def description(field: Field) -> str:
    """What a field does and which rules it obeys, in one line."""
    text = field.doc
    if field.limits.choices:
        text += f": {', '.join(field.limits.choices)}"
    if field.name in COMMIT_FIELDS:
        others = [name for name in COMMIT_FIELDS if name != field.name]
        text += f"; not with alg, {', '.join(others)}"
    if field.name in REQUIRED_WITH:
        text += f"; needs {REQUIRED_WITH[field.name]}"
    if field.name in CACHE_FIELDS:
        if field.name != "cache":
            text += f"; with cache {', '.join(CACHE_FIELDS[field.name])}"
        text += "; default: the server's"
    return text


def triton_type(field: Field) -> str:
    """Triton's type for a field's values."""
    return {int: "INT64", float: "FP32", bool: "BOOL", str: "BYTES", dict: "BYTES"}[field.type]


def python_type(field: Field) -> str:
    """A field's type as an annotation."""
    if field.type is dict:
        return "dict[str, Any]"
    return f"list[{field.type.__name__}]" if field.is_list else field.type.__name__


def literal(text: str) -> str:
    """A string as Python source, in pieces that fit on a line."""
    return " ".join(repr(part) for part in re.findall(r".{1,75}(?: |$)", text))


def config_inputs(table: Table) -> Iterator[str]:
    """Inputs of the Triton models (config.pbtxt)."""
    for name, field in table.items():
        kind = triton_type(field).replace("BYTES", "STRING")
        size = f"[ {'-1' if field.is_list else '1'} ]"
        name_and_type = f"name: {json.dumps(name):<22} data_type: TYPE_{kind:<6}"
        yield f"  {{ {name_and_type} dims: {size:<6} optional: true }},"


def tensor_types(table: Table) -> Iterator[str]:
    """Entries of the adapter's table of Triton types."""
    for name, field in table.items():
        yield f'    "{name}": "{triton_type(field)}",'


def denoising_fields(table: Table) -> Iterator[str]:
    """Fields that every body of the REST API has, OpenAI's included."""
    for field in table.values():
        if field.name not in LIMITED_BY_SETTING:
            kind = REST_TYPES.get(python_type(field), python_type(field))
            yield f"    {field.name}: {kind} | None = {_pydantic(field, None)}"
            yield _docstring(description(field))


def amount_fields(table: Table) -> Iterator[str]:
    """Fields that the REST API's own bodies have besides."""
    for name, setting in LIMITED_BY_SETTING.items():
        field = table[name]
        yield f"    {name}: {python_type(field)} = {_pydantic(field, field.default)}"
        yield _docstring(f"{description(field)}; at most {setting}")


def _docstring(text: str) -> str:
    """A field's description below it; pydantic takes it from there."""
    return textwrap.indent("\n".join(textwrap.wrap(f'"""{text}"""', 96)), "    ")


def _pydantic(field: Field, default: object) -> str:
    """The default, with the limits of a number, or the choices."""
    limits: dict[str, object] = {key: getattr(field.limits, key) for key in ("ge", "gt", "le")}
    if field.type is int and field.limits.le is None:
        limits["le"] = "INT32_MAX"
    given = [f"{key}={value}" for key, value in limits.items() if value is not None]
    if field.limits.choices:
        given.append(f"examples={json.dumps(field.limits.choices)}")
    return f"Field({', '.join([repr(default), *given])})" if given else repr(default)


def client_fields(table: Table) -> Iterator[str]:
    """The client's keyword arguments, each with its line for `dllm --help`."""
    for field in table.values():
        yield f"    {field.name}: Annotated[{python_type(field)}, {literal(description(field))}]"


def page_rows(table: Table) -> Iterator[str]:
    """The table on docs/fields.md."""
    yield ""
    yield "| field | type | values | default | meaning |"
    yield "|---|---|---|---|---|"
    for field in table.values():
        default = "" if field.default in (None, ()) else f"`{json.dumps(field.default)}`"
        cells = [f"`{field.name}`", python_type(field), values(field), default, description(field)]
        yield f"| {' | '.join(cells)} |"
    yield ""


def values(field: Field) -> str:
    """The limits of a field in words."""
    limits = field.limits
    if limits.max_items:
        return f"at most {limits.max_items}, of 1 to {limits.max_chars} characters"
    if field.type in (bool, str, dict):
        return ""
    return "64 bits" if limits.le == INT64_MAX else limits.rule


#: What writes the lists of a file, in their order.
WRITERS: Mapping[str, tuple[Writer, ...]] = {
    "model_repository/dllm/config.pbtxt": (config_inputs,),
    "model_repository/dllm_unary/config.pbtxt": (config_inputs,),
    "adapter/engine/tensors.py": (tensor_types,),
    "adapter/api/schemas.py": (denoising_fields, amount_fields),
    "client/dllm_client/_types.py": (client_fields,),
    "docs/fields.md": (page_rows,),
}


def written(path: str, text: str, table: Table = FIELDS) -> str:
    """The text of the file at `path`, with its lists made from the table."""
    writers = iter(WRITERS[path])
    if len(BLOCK.findall(text)) != len(WRITERS[path]):
        raise SystemExit(f"{path}: needs {len(WRITERS[path])} x `make fields: begin` and `end`")
    made = BLOCK.sub(lambda found: found[1] + "\n".join(next(writers)(table)), text)
    return formatted(made) if path.endswith(".py") else made


def formatted(source: str) -> str:
    """Python as `make format` leaves it."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", "fields.py", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    """Write every list that is not up to date, and name its file."""
    for path in WRITERS:
        text = (ROOT / path).read_text(encoding="utf-8")
        if (made := written(path, text)) != text:
            (ROOT / path).write_text(made, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
