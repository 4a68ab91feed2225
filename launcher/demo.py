"""A first look at the service: the guide's own requests and a few questions, asked for real."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dllm_client import Client, Params, Result, Status
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

POLL_SECONDS = 0.1
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


def ask(client: Client) -> list[Asked]:
    """Submit everything; the first three prompts are those of the deployment guide."""
    prompt = "Tell me about AI"
    request_id = client.submit(prompt, temperature=0.6, gen_length=128)
    asked = [Asked("POST /v1/generate, temperature 0.6", prompt, request_id)]
    guide: Params = {"temperature": 0.0, "gen_length": 64}
    asked += _ask_batch(client, ("What is AI?", "Explain ML."), guide)
    return asked + _ask_batch(client, QUESTIONS, {"gen_length": 32})


def _ask_batch(client: Client, prompts: Sequence[str], params: Params) -> list[Asked]:
    request_ids = client.submit_batch(prompts, **params)
    pairs = zip(prompts, request_ids, strict=True)
    return [Asked("POST /v1/generate_batch", prompt, request_id) for prompt, request_id in pairs]


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


def run(client: Client, console: Console) -> bool:
    """The whole demonstration; True when every job was finished. Raises a DllmError."""
    begun = time.monotonic()
    asked = ask(client)
    console.print(f"submitted {len(asked)} prompts in 3 calls", highlight=False)
    done = wait(client, asked, console)
    show(asked, done, console)
    finished = sum(result.status is Status.FINISHED for result in done.values())
    seconds = time.monotonic() - begun
    console.print(f"{finished} of {len(asked)} jobs finished in {seconds:.1f} s", highlight=False)
    return finished == len(asked)
