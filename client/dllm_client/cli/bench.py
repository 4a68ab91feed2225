"""`dllm bench`: sends a load to the service and prints how it did."""

import asyncio
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from dllm_client._load import MEASURES, Load, Sample, random_requests, report, run_load
from dllm_client._progress import progress_bar
from dllm_client._types import Params, Request
from dllm_client.cli.options import Server, command, stderr
from dllm_client.cli.output import print_json

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

DEFAULT_LENGTH = 64
TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token after it",
    "itl": "between events with more text",
    "e2el": "end-to-end latency",
}
#: Fields with a value for each request, which are saved and not printed.
LISTS = (
    *("input_lens", "output_lens", "start_times", "ttfts", "itls", "e2els"),
    *("generated_texts", "errors"),
)


@command(app)
def bench(
    server: Server,
    params: Params,
    as_json: bool,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 100,
    request_rate: Annotated[
        float, typer.Option(min=0.001, help="Requests per second; default: all at once.")
    ] = math.inf,
    burstiness: Annotated[
        float, typer.Option(min=0.01, help="1: Poisson arrivals; below: bursts; above: even ones.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests at once; others wait here.")
    ] = None,
    input_len: Annotated[
        str, typer.Option(help="Words of a random prompt: a number, or LEAST:MOST.")
    ] = "32",
    output_len: Annotated[
        str | None, typer.Option(help="Tokens of an answer: a number, or LEAST:MOST.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Send the lines of this file, again and again.")
    ] = None,
    warmups: Annotated[int, typer.Option(min=0, help="Requests before those that count.")] = 1,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="MEASURE:MILLISECONDS that a good request keeps; may be repeated."),
    ] = None,
    load_seed: Annotated[int, typer.Option(help="Repeats arrivals and random prompts.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write the whole report, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the latencies: *.png, *.svg.")] = None,
) -> None:
    """Send a load to the service and report latencies, throughput and goodput.

    Answers run to their whole length (ignore_eos) unless you --set ignore_eos=false. The report has
    the fields of `vllm bench serve`. The exit code is 1 if a request failed.
    """
    for option, file in (("--save", save), ("--plot", plot)):
        if file is not None and not file.absolute().parent.is_dir():
            raise typer.BadParameter(
                f"must be in a directory that exists, not {file.parent}", param_hint=option
            )
    if plot is not None:
        _require_plot_format(plot)
    limits = dict(_limit(text) for text in goodput or ())
    load = Load(request_rate, burstiness, max_concurrency, load_seed)
    fields: Params = {"gen_length": DEFAULT_LENGTH, "ignore_eos": True, **params}
    lengths = _range("--output-len", output_len) if output_len else None
    words = _range("--input-len", input_len)
    requests = random_requests(num_prompts, words=words, gen_lengths=lengths, seed=load_seed)
    if prompts is not None:
        requests = _with_prompts(requests, prompts)
    found = asyncio.run(_bench(server, requests, load, fields, warmups, limits))
    if save is not None:
        save.write_text(json.dumps(found) + "\n", encoding="utf-8")
    if plot is not None:
        _draw(found, plot)
    if as_json:
        print_json({name: value for name, value in found.items() if name not in LISTS})
    else:
        typer.echo(_table(found))
    if found["failed"]:
        first = next(error for error in found["errors"] if error)
        stderr.print("dllm:", f"{found['failed']} requests failed: {first}", markup=False)
        raise typer.Exit(1)


async def _bench(
    server: Server,
    requests: list[Request],
    load: Load,
    params: Params,
    warmups: int,
    limits: dict[str, float],
) -> dict[str, Any]:
    async with server.connect_async() as client:
        (model, *_) = [*await client.models(), ""]
        if warmups:
            await run_load(client, requests[:1] * warmups, Load(math.inf), params)
        with progress_bar(len(requests), shown=True) as advance:
            samples: list[Sample]
            samples, duration = await run_load(client, requests, load, params, advance)
    return report(samples, duration, load=load, model=model, goodput=limits)


def _range(option: str, text: str) -> tuple[int, int]:
    """Least and most of `text`, a number or LEAST:MOST."""
    least, _, most = text.partition(":")
    try:
        low, high = int(least), int(most or least)
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high:
        raise typer.BadParameter(f"must be a number or LEAST:MOST, not {text!r}", param_hint=option)
    return low, high


def _limit(text: str) -> tuple[str, float]:
    """A measure and its limit in milliseconds."""
    name, _, limit = text.partition(":")
    try:
        milliseconds = float(limit)
    except ValueError:
        milliseconds = 0.0
    if name not in MEASURES or not milliseconds > 0:
        known = ", ".join(MEASURES)
        raise typer.BadParameter(f"must be one of {known}, with :MILLISECONDS, not {text!r}")
    return name, milliseconds


def _with_prompts(requests: list[Request], file: Path) -> list[Request]:
    """The requests with the lines of a file in place of their prompts."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file}: {error}", param_hint="--prompts") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise typer.BadParameter(f"{file} has no prompts", param_hint="--prompts")
    return [Request(lines[i % len(lines)], one.params) for i, one in enumerate(requests)]


def _table(found: dict[str, Any]) -> str:
    rows = [
        ("requests", f"{found['completed']} of {found['num_prompts']}"),
        ("seconds", f"{found['duration']:.2f}"),
        ("requests per second", f"{found['request_throughput']:.2f}"),
        ("tokens per second", f"{found['output_throughput']:.1f}"),
        ("tokens per step", f"{found['tokens_per_step']:.2f}"),
    ]
    if "request_goodput" in found:
        rows.append(("good requests per second", f"{found['request_goodput']:.2f}"))
    lines = [f"{name:<34}{value:>10}" for name, value in rows]
    lines += ["", f"{'milliseconds':<34}{'mean':>10}{'median':>10}{'p99':>10}"]
    for measure in MEASURES:
        values = (found[f"{kind}_{measure}_ms"] for kind in ("mean", "median", "p99"))
        numbers = "".join(f"{value:>10.1f}" for value in values)
        lines.append(f"{TITLES[measure]:<34}{numbers}")
    return "\n".join(lines)


def _require_plot_format(file: Path) -> None:
    """Refuse a file that cannot be drawn before the load is sent."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "needs matplotlib: pip install 'dllm-serve[bench]'"
        raise typer.BadParameter(message, param_hint="--plot") from error
    known = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        message = f"must end with one of {', '.join(f'.{kind}' for kind in known)}, not {file.name}"
        raise typer.BadParameter(message, param_hint="--plot")


def _draw(found: dict[str, Any], file: Path) -> None:
    """Draw the share of requests within each latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    answered = [not error for error in found["errors"]]
    for name, key, color in (("first token", "ttfts", "C0"), ("end to end", "e2els", "C1")):
        values = sorted(v for v, ok in zip(found[key], answered, strict=True) if ok)
        shares = [(i + 1) / len(values) for i in range(len(values))]
        axes.step(values, shares, where="post", label=name, color=color)
    axes.set(xlabel="seconds", ylabel="share of requests", ylim=(0, 1), xlim=(0, None))
    axes.set_title(
        f"{found['completed']} requests, {found['request_rate']} per second, "
        f"{found['output_throughput']:.0f} tokens per second"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
