"""Sends a load to a service and measures it: arrivals, lengths, latencies, goodput.

The names of the measures and of the fields of a report are those of `vllm bench serve`:

- ttft: time to first token, until the first text that is final;
- itl: inter-token latency, between two events that bring more final text;
- tpot: time per output token after the first, `(e2el - ttft) / (tokens - 1)`;
- e2el: end-to-end latency.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np

from dllm_client._client import AsyncClient
from dllm_client._errors import DllmError
from dllm_client._types import Answer, Params, Prompt, Request

MEASURES = ("ttft", "tpot", "itl", "e2el")
#: Words of random prompts.
_TEXT = """
a about after all also and any as at back be because but by can come could day do even
first for from get give go good have how in into it its just know like look make most
new no not now of on one only or other our out over people say see so some take than
that the their them then there these they think this time to two up us use want way we
well what when which who will with work would year you your
"""
WORDS = tuple(_TEXT.split())


@dataclass
class Sample:
    """The measurements of one request; times in seconds."""

    start: float  #: since the load began
    ttft: float = 0.0
    e2el: float = 0.0
    itl: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Load:
    """How requests arrive."""

    rate: float  #: requests per second; infinite: all at once
    burstiness: float = 1.0  #: 1: a Poisson process; below, bursts; above, more even
    max_concurrency: int | None = None
    seed: int = 0

    def gaps(self) -> Iterator[float]:
        """Seconds between arrivals: a gamma distribution with mean `1 / rate`.

        Its shape is the burstiness, as in `vllm bench serve`; with 1 it is exponential.
        """
        rng = random.Random(self.seed)
        while True:
            if self.rate == float("inf"):
                yield 0.0
            else:
                yield rng.gammavariate(self.burstiness, 1.0 / (self.rate * self.burstiness))


def random_requests(
    number: int, *, words: tuple[int, int], gen_lengths: tuple[int, int] | None, seed: int = 0
) -> list[Request]:
    """Prompts of random words.

    Args:
        number: how many.
        words: least and most words of a prompt; uniform between them.
        gen_lengths: least and most tokens of a canvas; None leaves the length to the caller.
        seed: repeats them.
    """
    rng = random.Random(seed)
    requests = []
    for _ in range(number):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(*words)))
        params = Params(gen_length=rng.randint(*gen_lengths)) if gen_lengths else Params()
        requests.append(Request(prompt, params))
    return requests


async def run_load(
    client: AsyncClient,
    requests: Sequence[Request],
    load: Load,
    params: Params,
    on_done: Callable[[], None] = lambda: None,
) -> tuple[list[Sample], float]:
    """Send the requests as `load` says.

    Args:
        client: where to.
        requests: what to send; their own fields go before `params`.
        load: when to send it.
        params: fields of all requests.
        on_done: called after each request.

    Returns:
        A sample for each request, in order, and the seconds until the last one ended.
    """
    begun = time.perf_counter()
    slots = asyncio.Semaphore(load.max_concurrency or len(requests))

    async def one(request: Request) -> Sample:
        async with slots:
            sample = await measure(
                client, request.prompt, cast(Params, {**params, **request.params}), begun
            )
        on_done()
        return sample

    async with asyncio.TaskGroup() as group:
        tasks = []
        async for request in _arrivals(requests, load):
            tasks.append(group.create_task(one(request)))
    return [task.result() for task in tasks], time.perf_counter() - begun


async def _arrivals(requests: Iterable[Request], load: Load) -> AsyncIterator[Request]:
    """The requests at their times, which do not depend on when answers come."""
    due = time.perf_counter()
    for request, gap in zip(requests, load.gaps(), strict=False):
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield request
        due += gap


async def measure(client: AsyncClient, prompt: Prompt, params: Params, begun: float) -> Sample:
    """Stream one answer and measure it; an error of the service is part of the sample."""
    start = time.perf_counter()
    sample = Sample(start - begun)
    seen, last = "", start
    try:
        async with aclosing(client.stream(prompt, **params)) as events:
            async for event in events:
                now = time.perf_counter()
                text = event.text if isinstance(event, Answer) else event.final_text
                if len(text) > len(seen) or (isinstance(event, Answer) and last == start):
                    if last == start:
                        sample.ttft = now - start
                    else:
                        sample.itl.append(now - last)
                    seen, last = text, now
                if isinstance(event, Answer):
                    usage = event.usage
                    sample.prompt_tokens = usage.prompt_tokens
                    sample.output_tokens = usage.completion_tokens
                    sample.steps = usage.steps
                    sample.text, sample.e2el = event.text, now - start
    except DllmError as error:
        sample.error = str(error)
    return sample


def report(
    samples: Sequence[Sample],
    duration: float,
    *,
    load: Load,
    model: str,
    goodput: Mapping[str, float],
    percentiles: Sequence[float] = (50, 90, 95, 99),
) -> dict[str, Any]:
    """The report of a load, with the fields that `vllm bench serve` writes.

    Args:
        samples: one for each request.
        duration: seconds of the load.
        load: how they arrived.
        model: the model's name.
        goodput: most milliseconds by measure; a request that keeps all of them is good.
        percentiles: which ones to compute, from 0 to 100.
    """
    done = [sample for sample in samples if not sample.error]
    prompts, outputs = (
        sum(one.prompt_tokens for one in done),
        sum(one.output_tokens for one in done),
    )
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "dllm",
        "model_id": model,
        "num_prompts": len(samples),
        "request_rate": "inf" if load.rate == float("inf") else load.rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "duration": duration,
        "completed": len(done),
        "failed": len(samples) - len(done),
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (prompts + outputs) / duration,
        "tokens_per_step": outputs / max(1, sum(one.steps for one in done)),
        "input_lens": [one.prompt_tokens for one in samples],
        "output_lens": [one.output_tokens for one in samples],
        "start_times": [one.start for one in samples],
        "ttfts": [one.ttft for one in samples],
        "itls": [one.itl for one in samples],
        "e2els": [one.e2el for one in samples],
        "generated_texts": [one.text for one in samples],
        "errors": [one.error for one in samples],
    }
    if goodput:
        good = sum(_is_good(one, goodput) for one in done)
        found["request_goodput"] = good / duration
    for measure_name in MEASURES:
        found |= _statistics(measure_name, _values(measure_name, done), percentiles)
    return found


def _is_good(sample: Sample, limits: Mapping[str, float]) -> bool:
    """Whether the sample keeps all limits, in milliseconds; of itl, its mean."""
    for name, limit in limits.items():
        values = _values(name, [sample])
        if values and 1000 * float(np.mean(values)) > limit:
            return False
    return True


def _values(name: str, samples: Sequence[Sample]) -> list[float]:
    """A measure of all samples, in seconds."""
    if name == "itl":
        return [gap for sample in samples for gap in sample.itl]
    values = [getattr(sample, name) for sample in samples]
    return [value for value in values if value is not None]


def _statistics(
    name: str, values: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float]:
    """Mean, median, deviation and percentiles in milliseconds; 0 without values."""
    array = 1000 * np.array(values or [0.0])
    found = {
        f"mean_{name}_ms": float(array.mean()),
        f"median_{name}_ms": float(np.median(array)),
        f"std_{name}_ms": float(array.std()),
    }
    for q in percentiles:
        found[f"p{q:g}_{name}_ms"] = float(np.percentile(array, q))
    return found
