"""`dllm pull` and `dllm inspect`: how to get a checkpoint, and what it is."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launcher.checkpoint import HUB_ID, find_checkpoint, incomplete_files, size_of
from launcher.console import one_line_errors, wants_json
from launcher.errors import CheckpointError
from launcher.settings import Settings

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

Model = Annotated[str, typer.Argument(help="A checkpoint's directory, or its id on the Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def pull(ctx: typer.Context, model: Model, as_json: Json = False) -> None:
    """Tell how to get a checkpoint; if it is here, check that it is whole and can be served.

    Nothing is fetched. The exit code is 1 while the checkpoint is not here, or not whole.
    """
    with one_line_errors():
        directory = find_checkpoint(model)
        problems = incomplete_files(directory)
        if problems:
            again = f"; fetch it again: hf download {model}" if HUB_ID.fullmatch(model) else ""
            raise CheckpointError(f"{directory}: {'; '.join(problems)}{again}")
        found = described(directory)
    size = size_of(directory)
    if wants_json(ctx, as_json):
        architecture = found["architecture"]
        print(json.dumps({"path": str(directory), "bytes": size, "architecture": architecture}))
        return
    print(f"{directory}: whole, {_gib(size)}, {found['architecture']}")
    print(f"serve it:    dllm serve {model}")
    print(f"what it is:  dllm inspect {model}")


@app.command()
def inspect(ctx: typer.Context, model: Model, as_json: Json = False) -> None:
    """Print a checkpoint's family, sizes and memory plan, here and on well-known cards.

    Nothing is loaded. The settings (DLLM_*) are those that `dllm serve` would use.
    """
    with one_line_errors():
        found = described(find_checkpoint(model))
    if wants_json(ctx, as_json):
        print(json.dumps(found))
        return
    _show(found, Console(highlight=False))


def described(directory: Path, settings: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the engine says of a checkpoint; a process of its own, since this one has no torch.

    `settings` come before those of the environment.

    Raises CheckpointError with the engine's words if it would not serve the checkpoint.
    """
    engine = str(Settings.with_options().model_repository / "dllm" / "1")
    paths = [engine, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "dllm_engine.describe", str(directory)]
    env = {**os.environ, **(settings or {}), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the engine said nothing"]
        if "ModuleNotFoundError" in lines[-1]:
            lines[-1] += ": pip install 'dllm-serve[engine]'"
        raise CheckpointError(f"{directory}: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _show(found: dict[str, Any], console: Console) -> None:
    spec, weights, here = found["spec"], found["weight_bytes"], found["here"]
    context = spec["max_model_len"]
    rows = {
        "architecture": found["architecture"],
        "parameters": f"{found['parameters'] / 1e6:,.1f} million",
        "layers": f"{spec['num_layers']}, {spec['hidden_size']} wide, {spec['num_heads']} heads "
        f"({spec['num_kv_heads']} of keys and values)",
        "vocabulary": f"{spec['vocab_size']:,} tokens; the mask is {spec['mask_token_id']}",
        "context": f"{context:,} tokens",
        "weights": ", ".join(f"{_gib(size)} in {kind}" for kind, size in weights.items()),
        "keys, values": f"{found['kv_bytes_per_token'] / 1024:.0f} KiB a token here",
    }
    for name, value in rows.items():
        console.print(f"{name:>13}  {value}", markup=False, soft_wrap=True)
    table = Table("device", "memory", "fits", "sequences", "weights", "keys, values", "other")
    table.add_row(*_row(f"here: {here['device']}", here))
    for card in found["cards"]:
        table.add_row(*_row(card["device"], card))
    console.print(table)
    console.print(
        f"sequences: how many of {context:,} tokens keep their keys and values at once. Other:\n"
        "activations (estimated; a start measures them), logits, requests and CUDA graphs."
    )
    if here["problem"]:
        console.print(f"here: {here['problem']}", markup=False, soft_wrap=True)


def _row(name: str, fit: dict[str, Any]) -> tuple[str, ...]:
    plan = fit["plan"]
    if plan is None:
        return name, _gib(fit["memory"]), "no", "", "", "", ""
    kind = fit["dtype"] if fit["quantization"] == "none" else fit["quantization"]
    how = kind if fit["num_ranks"] == 1 else f"{kind}, {fit['num_ranks']} of them"
    other = sum(plan[part] for part in ("requests", "activations", "logits", "graphs"))
    pages = plan["page"] * plan["num_pages"]
    sizes = (_gib(plan["weights"]), _gib(pages), _gib(other))
    return name, _gib(fit["memory"]), how, str(fit["num_sequences"]), *sizes


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
