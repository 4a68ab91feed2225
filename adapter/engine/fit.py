"""Shortens the canvas of a request to the room that its prompt leaves in the model's context."""

import asyncio
import re
from collections.abc import Sequence
from typing import cast

from adapter.engine.pool import Endpoint, EnginePool
from adapter.errors import ContextExceeded, EngineError, InvalidRequest, refusal
from adapter.types import Inputs

#: If the engine has not checked a request by then, it runs unchanged.
CHECK_SECONDS = 1.0
#: Inputs that the engine names when it refuses a request because it is too long.
LENGTHS = ("gen_length", "cache")
#: What the engine says of a prompt that leaves no room.
TOO_LONG = re.compile(
    r"prompt \((\d+) tokens\) plus gen_length \(\d+\)"
    r"(?: in whole blocks of \d+)? must be at most (\d+)"
)


async def fit_lengths(pool: EnginePool, requests: Sequence[Inputs]) -> list[Inputs]:
    """Return the requests, each with a canvas that fits its context.

    While no engine answers, they are returned unchanged. Raises `InvalidRequest` for the first
    request that an engine would refuse at any length, and `ContextExceeded` if its prompt alone is
    too long.
    """
    endpoint = pool.pick(include_backing_off=True)
    if endpoint is None:
        return list(requests)
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await _fitted(endpoint, requests)
    except (TimeoutError, EngineError):
        endpoint.monitor.request_probe()
        return list(requests)


async def _fitted(endpoint: Endpoint, requests: Sequence[Inputs]) -> list[Inputs]:
    fitted = list(requests)
    refusals = await endpoint.check(requests)
    for reason in refusals.values():
        if reason.partition(":")[0] not in LENGTHS:
            raise refusal(reason)
    if not refusals:
        return fitted
    # A block-wise model's blocks may end behind the answer; other lengths have other keys and
    # values.
    keeps_block = (await endpoint.describe()).block_length is not None
    shortest = {index: _shortened(_formless(requests[index]), 1, keeps_block) for index in refusals}
    results = await endpoint.engine.check(list(shortest.values()))
    for index, result in zip(shortest, results, strict=True):
        if result.refusal:
            raise _too_long(requests[index], result.refusal)
        fitted[index] = _shortened(requests[index], 1 + result.headroom, keeps_block)
    return fitted


def _formless(inputs: Inputs) -> Inputs:
    """The request without the form of its text, of which a single token may be too short."""
    return {name: value for name, value in inputs.items() if name != "structured_outputs"}


def _shortened(inputs: Inputs, most: int, keeps_block: bool) -> Inputs:
    """The request with a canvas of at most so many tokens; unless kept, its block is no longer."""
    length = min(cast(int, inputs["gen_length"]), most)
    changed = {**inputs, "gen_length": length}
    if "block_length" in inputs and not keeps_block:
        changed["block_length"] = min(cast(int, inputs["block_length"]), length)
    return changed


def _too_long(inputs: Inputs, reason: str) -> InvalidRequest:
    found = TOO_LONG.search(reason)
    if found is None:
        return refusal(reason)
    field = next(name for name in ("messages", "input_ids", "text_input") if name in inputs)
    problem = f"its {found[1]} tokens leave no room for an answer in the model's {found[2]}"
    return ContextExceeded(f"{field}: {problem}")
