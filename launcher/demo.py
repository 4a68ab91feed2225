"""A first look at the service: the guide's own requests and a few questions, asked for real."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dllm_client import Client, Params, Result, Status
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from launcher.repository import add_model

POLL_SECONDS = 0.1
#: The second model's name and its checkpoint in the repository.
SECOND, SECOND_CHECKPOINT = "dream", "dllm/1/demo_checkpoint_dream"
QUESTIONS = (
    "What is 17 + 25?",
    "Sort these numbers: 5 3 9 1",
    "What is the capital of France?",
)


@dataclass(frozen=True)
class Asked:
    """A prompt, where it was sent, and its job."""

    call: str
    prompt: str
    request_id: int


def two_models(repository: Path, folder: Path) -> Path:
    """Make a repository in `folder` that has the Dream demo checkpoint as a second model."""
    both = folder / "repository"
    both.mkdir()
    for name in ("dllm", "dllm_unary"):
        (both / name).symlink_to((repository / name).resolve(), target_is_directory=True)
    add_model(both, SECOND, str((repository / SECOND_CHECKPOINT).resolve()))
    return both


def ask(client: Client, *, two: bool = False) -> list[Asked]:
    """Submit everything; the first three prompts are those of the deployment guide.

    `two`: ask the questions of the second model, too.
    """
    prompt = "Tell me about AI"
    request_id = client.submit(prompt, temperature=0.6, gen_length=128)
    asked = [Asked("POST /v1/generate, temperature 0.6", prompt, request_id)]
    guide: Params = {"temperature": 0.0, "gen_length": 64}
    asked += _ask_batch(client, ("What is AI?", "Explain ML."), guide)
    asked += _ask_batch(client, QUESTIONS, {"gen_length": 32})
    if two:
        asked += _ask_batch(client, QUESTIONS, {"gen_length": 32, "model": SECOND})
    return asked


def _ask_batch(client: Client, prompts: Sequence[str], params: Params) -> list[Asked]:
    request_ids = client.submit_batch(prompts, **params)
    pairs = zip(prompts, request_ids, strict=True)
    call = "POST /v1/generate_batch" + (f", model {params['model']}" if "model" in params else "")
    return [Asked(call, prompt, request_id) for prompt, request_id in pairs]


def wait(client: Client, asked: Sequence[Asked], console: Console) -> dict[int, Result]:
    """Poll until every job is done, moving a bar."""
    done: dict[int, Result] = {}
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(asked))
        while len(done) < len(asked):
            for request_id in [one.request_id for one in asked if one.request_id not in done]:
                result = client.result(request_id)
                if result.done:
                    done[request_id] = result
            progress.update(task, completed=len(done))
            time.sleep(POLL_SECONDS)
    return done


def show(asked: Sequence[Asked], done: dict[int, Result], console: Console) -> None:
    """Print every prompt with its result."""
    for one in asked:
        result = done[one.request_id]
        if result.status is Status.FINISHED:
            outcome = Text(result.text or "(an empty text)")
        else:
            outcome = Text(f"{result.status}: {result.error or 'no reason given'}", "bold red")
        title = Text(f"job {result.request_id} · {one.call}")
        console.print(Panel(Group(Text(one.prompt, "bold"), outcome), title=title))


def run(client: Client, console: Console, *, two: bool = False) -> bool:
    """The whole demonstration; True when every job was finished. Raises a DllmError."""
    begun = time.monotonic()
    asked = ask(client, two=two)
    calls = 4 if two else 3
    console.print(f"submitted {len(asked)} prompts in {calls} calls", highlight=False)
    done = wait(client, asked, console)
    show(asked, done, console)
    finished = sum(result.status is Status.FINISHED for result in done.values())
    seconds = time.monotonic() - begun
    console.print(f"{finished} of {len(asked)} jobs finished in {seconds:.1f} s", highlight=False)
    return finished == len(asked)
