"""Offline use: `LLM(path).generate(prompts, params)`, or `stream` for one prompt."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from dllm_engine.config import EngineConfig, unknown_setting
from dllm_engine.decisions import Answer, read_decisions
from dllm_engine.errors import EngineDead, InvalidRequest
from dllm_engine.loop.engine import Engine
from dllm_engine.readings import Readings
from dllm_engine.request import (
    CanvasUpdate,
    Completion,
    DenoisingStep,
    Prompt,
    Request,
    Trajectory,
)
from dllm_engine.sampling_params import SamplingParams
from dllm_engine.scores import Score, read_scores

T = TypeVar("T")

#: A text, chat messages, token ids, or a `Prompt` with a canvas or suffix of its own.
AnyPrompt = (
    str | Sequence[Mapping[str, Any]] | Sequence[int] | npt.NDArray[np.integer[Any]] | Prompt
)

#: Functions that the model may call, as OpenAI's API has them.
Tools = Sequence[Mapping[str, Any]]

FORMS = "a prompt must be a text, a list of messages, or a list of integers (token ids)"


class LLM:
    """A diffusion language model in this process.

    Thread-safe: the requests of all calls run together, and each call steps the engine until its
    own are finished.

    Args:
        model_path: a checkpoint directory in its Hugging Face layout.
        **settings: further fields of `EngineConfig`.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        InvalidConfig: a setting is unusable.
    """

    def __init__(self, model_path: str | Path, **settings: Any) -> None:
        known = [field.name for field in dataclasses.fields(EngineConfig)]
        if unknown := sorted(settings.keys() - set(known)):
            raise unknown_setting(unknown[0], known)
        self.engine = Engine(EngineConfig(model_path=Path(model_path), **settings))
        self._lock = threading.Lock()
        #: Updates of running requests that their calls have not taken yet.
        self._updates: dict[int, collections.deque[CanvasUpdate]] = {}

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        tools: Tools | None = None,
        progress: bool = True,
        trajectory: bool = False,
    ) -> list[Completion]:
        """Denoise one canvas per prompt; all run together.

        Args:
            prompts: a list of prompts, or a single one.
            params: one for all prompts, or one for each; None: the defaults.
            chat: put each text into the checkpoint's chat template, as one user message.
            tools: functions that the model may call, as OpenAI's API has them; only with messages
                or `chat`. Calls are in the text, as `<tool_call>{"name": …}</tool_call>`.
            progress: show a progress bar.
            trajectory: record the step in which each position was committed.

        Returns:
            Completions in the order of the prompts.

        Raises:
            InvalidRequest: a prompt or parameter is unusable; no prompt was run.
            RequestFailed: a request failed in the engine.
        """
        batch = _as_list(prompts)
        each = _one_per_prompt(params, len(batch))
        requests = [
            self.engine.make_request(self._encode(prompt, chat, tools), p)
            for prompt, p in zip(batch, each, strict=True)
        ]
        finished: dict[int, CanvasUpdate] = {}
        with tqdm(total=len(requests), desc="denoising", disable=not progress) as bar:
            for update in self._run(requests):
                if update.finished:
                    finished[update.request_id] = update
                    bar.update()
        return [self._completion(finished[r.request_id], r, trajectory) for r in requests]

    def stream(
        self,
        prompt: AnyPrompt,
        params: SamplingParams | None = None,
        *,
        chat: bool = False,
        tools: Tools | None = None,
    ) -> Generator[DenoisingStep | Completion, None, None]:
        """Denoise one canvas; yields it after each step, then its completion with the trajectory.

        Closing the generator cancels the request. Other calls run between its steps.

        Args:
            prompt: a single prompt.
            params: how to denoise; None: the defaults.
            chat: put a text into the checkpoint's chat template, as one user message.
            tools: as for `generate`.

        Raises:
            InvalidRequest: the prompt or a parameter is unusable.
            RequestFailed: the request failed in the engine.
        """
        request = self.engine.make_request(
            self._encode(prompt, chat, tools), params or SamplingParams(), stream_interval=0.0
        )
        shown = 0
        for update in self._run([request]):
            committed: list[int] = np.flatnonzero(update.reveal_steps > shown).tolist()
            shown = update.usage.steps
            if committed:
                yield self._step(update, request, committed)
            if update.finished:
                yield self._completion(update, request, trajectory=True)

    def decide(
        self,
        text: str | Sequence[Mapping[str, str]],
        questions: Sequence[Mapping[str, Any]],
    ) -> list[Answer]:
        """Answer typed questions about a text by probabilities, without writing any.

        Args:
            text: a text, or chat messages.
            questions: as `POST /v1/decisions` takes them; each instruction is a text.

        Returns:
            Answers in the order of the questions, shaped as those of `POST /v1/decisions`.

        Raises:
            InvalidRequest: names the field and the limit; nothing was run.
            RequestFailed: a question failed in the engine.
        """
        spec = self.engine.spec
        return self._read(
            read_decisions(
                text,
                questions,
                self.engine.tokenizer,
                spec.mask_token_id,
                blockwise=spec.blocks is not None,
            )
        )

    def score(
        self, pairs: Sequence[tuple[str, str]], *, mc_num: int | None = None, seed: int = 0
    ) -> list[Score]:
        """Score how likely each continuation is after its context.

        Exact, left to right, for block-wise models; LLaDA's Monte Carlo estimate for others.

        Args:
            pairs: context and continuation.
            mc_num: draws of the estimate; None: 128.
            seed: of the draws.

        Raises:
            InvalidRequest: names the field and the limit; nothing was run.
            RequestFailed: a pass failed in the engine.
        """
        spec = self.engine.spec
        return self._read(
            read_scores(
                pairs,
                self.engine.tokenizer,
                spec.mask_token_id,
                blockwise=spec.blocks is not None,
                mc_num=mc_num,
                seed=seed,
            )
        )

    def _read(self, readings: Readings[T]) -> T:
        """Run readings, and make their answer."""
        make, params = self.engine.make_request, SamplingParams()
        requests = [make(prompt, params) for prompt in readings.prompts]
        found: dict[int, CanvasUpdate] = {}
        for update in self._run(requests):
            if update.error is not None:
                raise update.error
            found[update.request_id] = update
        reads = [found[request.request_id].read for request in requests]
        return readings.answer([read for read in reads if read is not None])

    def close(self) -> None:
        """End the processes of other ranks (`tensor_parallel_size`); leaving `with` calls it."""
        self.engine.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: AnyPrompt, chat: bool, tools: Tools | None = None) -> Prompt:
        messages = None if isinstance(prompt, Prompt) else _as_messages(prompt)
        if isinstance(prompt, str) and chat:
            messages = [{"role": "user", "content": prompt}]
        if tools and messages is None:
            raise InvalidRequest("tools", "needs messages, or a text with chat")
        if isinstance(prompt, Prompt):
            return prompt
        if not isinstance(prompt, str) and messages is None:
            return Prompt(_token_ids(prompt))
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise InvalidRequest("prompts", "this checkpoint has no tokenizer; pass token ids")
        if messages is None:
            return Prompt(tokenizer.encode_text(cast(str, prompt)))
        described = _as_json("tools", list(tools)) if tools else None
        return Prompt(tokenizer.encode_messages(_as_json("messages", messages), described))

    def _run(self, requests: Sequence[Request]) -> Iterator[CanvasUpdate]:
        """Run requests beside those of other calls; yields their updates.

        Those that are unfinished when the caller stops are cancelled.
        """
        boxes = {r.request_id: collections.deque[CanvasUpdate]() for r in requests}
        unfinished = set(boxes)
        with self._lock:
            self._updates |= boxes
            for request in requests:
                self.engine.add(request)
        try:
            while unfinished:
                updates = [box.popleft() for box in boxes.values() if box]
                for update in updates:
                    if update.finished:
                        unfinished.discard(update.request_id)
                    yield update
                if not updates:
                    self._advance()
        except EngineDead:
            unfinished.clear()  # it cannot even cancel
            raise
        finally:
            with self._lock:
                for request_id in unfinished:
                    self.engine.cancel(request_id)
                for request_id in boxes:
                    del self._updates[request_id]

    def _advance(self) -> None:
        """Run a step, and hand out its updates."""
        with self._lock:
            # Another thread may have loaded the model, or this one may have run another model
            # since.
            self.engine.runner.bind_thread()
            for update in self.engine.step():
                if (box := self._updates.get(update.request_id)) is not None:
                    box.append(update)

    def _step(self, update: CanvasUpdate, request: Request, committed: list[int]) -> DenoisingStep:
        masked = update.token_ids == self.engine.spec.mask_token_id
        pieces = self._pieces(update.token_ids, ~masked)
        ready = update.token_ids[: update.num_ready]
        tokenizer = self.engine.tokenizer
        return DenoisingStep(
            step=update.usage.steps,
            token_ids=update.token_ids,
            confidence=update.confidence,
            committed=committed,
            canvas=[None if m else text for text, m in zip(pieces, masked, strict=True)],
            text=tokenizer.prefix(ready, request.params.stop) if tokenizer else "",
        )

    def _pieces(self, token_ids: npt.NDArray[np.int32], shown: npt.NDArray[np.bool_]) -> list[str]:
        tokenizer = self.engine.tokenizer
        return tokenizer.pieces(token_ids, shown) if tokenizer else [""] * len(token_ids)

    def _completion(self, update: CanvasUpdate, request: Request, trajectory: bool) -> Completion:
        if update.error is not None:
            raise update.error
        assert update.finish_reason is not None
        tokenizer, stop = self.engine.tokenizer, request.params.stop
        text = tokenizer.answer(update.token_ids[: update.num_ready], stop) if tokenizer else ""
        return Completion(
            text,
            update.token_ids,
            update.confidence,
            update.finish_reason,
            update.usage,
            update.seed,
            self._trajectory(update) if trajectory else None,
            update.reveal_steps if request.params.reveal_steps else None,
            update.log_probs,
        )

    def _trajectory(self, update: CanvasUpdate) -> Trajectory:
        steps = update.reveal_steps
        confidence = np.where(steps == 0, np.float32(1), update.confidence)
        return Trajectory(self._pieces(update.token_ids, steps >= 0), steps, confidence)


def _as_list(prompts: AnyPrompt | Sequence[AnyPrompt]) -> Sequence[AnyPrompt]:
    """The prompts; a text, a conversation or token ids alone are a list of one."""
    given = _plain(prompts)
    if isinstance(given, str | Prompt):
        return [given]
    if not isinstance(given, Sequence):
        raise InvalidRequest("prompts", f"{FORMS}, or a list of such; got {type(given).__name__}")
    items: list[Any] = [_plain(item) for item in given]
    return [items] if items and isinstance(items[0], Mapping | int | float) else items


def _as_messages(prompt: AnyPrompt) -> list[dict[str, Any]] | None:
    if isinstance(prompt, str | Prompt) or not isinstance(prompt, Sequence):
        return None
    if not prompt or not isinstance(prompt[0], Mapping):
        return None
    messages = cast(Sequence[Mapping[str, Any]], prompt)
    if not all(isinstance(message, Mapping) for message in messages):
        raise InvalidRequest("prompts", FORMS)
    return [dict(message) for message in messages]


def _token_ids(prompt: Any) -> list[int]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise InvalidRequest("prompts", f"{FORMS}; got {type(prompt).__name__}")
    ids = [_plain(token_id) for token_id in prompt]
    if wrong := [item for item in ids if type(item) is not int]:
        raise InvalidRequest("prompts", f"{FORMS}; got a list with {type(wrong[0]).__name__}")
    return ids


def _as_json(field: str, value: list[Any]) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(field, str(error)) from error


def _plain(value: Any) -> Any:
    """The value as Python's own: arrays of NumPy and PyTorch become lists, their numbers ints."""
    return value.tolist() if hasattr(value, "tolist") else value


def _one_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest("params", f"{len(params)} given for {count} prompts")
    return list(params)
