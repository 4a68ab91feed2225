"""Decisions and scores: one Triton request that becomes several of the engine's.

Each reads at the masks of one canvas; the last one to end sends the answer to all.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from dllm_dispatcher import WATCH_SECONDS, PendingRequest
from dllm_engine import CanvasUpdate, Engine, FinishReason, InvalidRequest, SamplingParams, Usage
from dllm_engine.decisions import read_decisions
from dllm_engine.readings import Readings
from dllm_engine.scores import read_scores, score_question
from dllm_tensors import (
    Inputs,
    failure_response,
    reading_response,
    request_options,
    text_input,
    to_response,
)

#: Inputs that say what to read; a request has one of them.
QUESTION_INPUTS = ("decide", "score")
#: Other inputs that such a request may have.
OPTION_INPUTS = ("priority", "cache_salt", "exclusive", "stream", "stream_interval")

Readable = Readings[dict[str, Any]]


def is_reading(inputs: Inputs) -> bool:
    """Whether a request asks for decisions or scores."""
    return any(name in inputs for name in QUESTION_INPUTS)


class ReadingGroup:
    """The engine's requests of one Triton request, and the answer that they make together.

    Raises:
        InvalidRequest: names the input and what is wrong with it.
    """

    def __init__(
        self, engine: Engine, request: Any, inputs: Inputs, sender: Any, outputs: frozenset[str]
    ) -> None:
        (name, *others) = [name for name in QUESTION_INPUTS if name in inputs]
        if others:
            raise InvalidRequest(name, f"cannot be combined with {others[0]}")
        if unusable := sorted(set(inputs) - {name, *OPTION_INPUTS}):
            raise InvalidRequest(unusable[0], f"cannot be combined with {name}")
        options = request_options(request, inputs)
        interval = options.pop("stream_interval")
        try:
            readings = _READERS[name](engine, _parsed(text_input(inputs, name)))
        except InvalidRequest as error:
            raise InvalidRequest(name, str(error)) from error
        params = SamplingParams()
        *first, last = readings.prompts
        requests = [engine.make_request(prompt, params, **options) for prompt in first]
        # The last one ends last: its updates show the caller that the engine works.
        requests.append(engine.make_request(last, params, stream_interval=interval, **options))
        self._readings = readings
        self._lead = PendingRequest(requests[-1], sender, outputs)
        self.parts = [
            ReadingPart(request, sender, outputs, group=self, index=index)
            for index, request in enumerate(requests)
        ]
        self._updates: list[CanvasUpdate | None] = [None] * len(requests)
        self._left = len(requests)
        self._lock = threading.Lock()
        self._cancelled, self._asked = False, 0.0

    def refuse(self) -> None:
        """Send nothing: the model answers the request itself."""
        with self._lead.lock:
            self._lead.answered = True

    def is_cancelled(self) -> bool:
        """Whether the client cancelled; asks Triton once per poll, however many parts there are."""
        with self._lock:
            now = time.monotonic()
            if not self._cancelled and now - self._asked >= WATCH_SECONDS / 2:
                self._asked = now
                self._cancelled = self._lead.is_cancelled()
            return self._cancelled

    def answer(self, engine: Engine, index: int, update: CanvasUpdate) -> tuple[Any, bool]:
        """See `PendingRequest.answer`."""
        if self._lead.answered:
            return None, False
        if not update.finished:
            params = self._lead.request.params
            return to_response(engine, update, params, self._lead.outputs), False
        with self._lock:
            self._updates[index] = update
            self._left -= 1
            if self._left:
                return None, False
        return self._whole(), True

    def send(self, response: Any, *, final: bool) -> None:
        """See `PendingRequest.send`."""
        self._lead.send(response, final=final)

    def _whole(self) -> Any:
        updates = [update for update in self._updates if update is not None]
        error = next((update.error for update in updates if update.error is not None), None)
        if error is not None:
            return failure_response(error)
        reads = [update.read for update in updates if update.read is not None]
        if len(reads) < len(updates):
            return reading_response("", FinishReason.CANCELLED, _total(updates), self._lead.outputs)
        text = json.dumps(self._readings.answer(reads))
        return reading_response(text, FinishReason.READ, _total(updates), self._lead.outputs)


@dataclasses.dataclass(eq=False)
class ReadingPart(PendingRequest):
    """One of a group's requests."""

    group: ReadingGroup = dataclasses.field(kw_only=True)
    index: int = dataclasses.field(kw_only=True)

    def send(self, response: Any, *, final: bool) -> None:
        """See `PendingRequest.send`."""
        self.group.send(response, final=final)

    def is_cancelled(self) -> bool:
        """See `PendingRequest.is_cancelled`."""
        return self.group.is_cancelled()

    def answer(self, engine: Engine, update: CanvasUpdate) -> tuple[Any, bool]:
        """See `PendingRequest.answer`."""
        return self.group.answer(engine, self.index, update)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("JSON", f"cannot be read: {error}") from error


def _decisions(engine: Engine, value: Any) -> Readable:
    if not isinstance(value, dict) or set(value) != {"input", "questions"}:
        raise InvalidRequest("JSON", 'must be an object with "input" and "questions"')
    spec = engine.spec
    found = read_decisions(
        value["input"],
        value["questions"],
        engine.tokenizer,
        spec.mask_token_id,
        blockwise=spec.blocks is not None,
    )
    return Readings(found.prompts, lambda reads: {"answers": found.answer(reads)})


def _scores(engine: Engine, value: Any) -> Readable:
    spec = engine.spec
    found = read_scores(
        **score_question(value),
        tokenizer=engine.tokenizer,
        mask=spec.mask_token_id,
        blockwise=spec.blocks is not None,
    )
    return Readings(
        found.prompts, lambda reads: {"scores": [vars(score) for score in found.answer(reads)]}
    )


_READERS: dict[str, Callable[[Engine, Any], Readable]] = {"decide": _decisions, "score": _scores}


def _total(updates: list[CanvasUpdate]) -> npt.NDArray[np.int32]:
    """The sum of all usages, as the output `usage`."""
    each = [dataclasses.astuple(update.usage) for update in updates]
    total = Usage(*(sum(column) for column in zip(*each, strict=True)))
    return np.array([dataclasses.astuple(total)], dtype=np.int32)
