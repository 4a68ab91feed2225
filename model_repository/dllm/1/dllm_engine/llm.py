"""Offline use: `LLM(path).generate(prompts, params)`."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from tqdm.auto import tqdm

from dllm_engine.config import EngineConfig, unknown_setting
from dllm_engine.errors import InvalidRequest
from dllm_engine.loop.engine import Engine
from dllm_engine.request import CanvasUpdate, Completion, Prompt
from dllm_engine.sampling_params import SamplingParams

#: A text, chat messages, token ids, or a `Prompt` with a canvas or suffix of its own.
AnyPrompt = str | Sequence[Mapping[str, str]] | Sequence[int] | Prompt


class LLM:
    """A diffusion language model in this process. Thread-safe: calls of `generate` take turns.

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

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        progress: bool = True,
    ) -> list[Completion]:
        """Denoise one canvas per prompt; all run together.

        Args:
            prompts: a list of prompts, or a single one.
            params: one for all prompts, or one for each; None: the defaults.
            chat: put each text into the checkpoint's chat template, as one user message.
            progress: show a progress bar.

        Returns:
            Completions in the order of the prompts.

        Raises:
            InvalidRequest: a prompt or parameter is unusable; no prompt was run.
            RequestFailed: a request failed in the engine.
        """
        batch = _as_list(prompts)
        each = _one_per_prompt(params, len(batch))
        requests = [
            self.engine.make_request(self._encode(prompt, chat), p)
            for prompt, p in zip(batch, each, strict=True)
        ]
        finished: dict[int, CanvasUpdate] = {}
        with self._lock:
            # Another thread may have loaded the model, or this one may have run another model
            # since.
            self.engine.runner.bind_thread()
            for request in requests:
                self.engine.add(request)
            with tqdm(total=len(requests), desc="denoising", disable=not progress) as bar:
                while self.engine.has_work:
                    for update in self.engine.step():
                        finished[update.request_id] = update
                        bar.update()
        return [self._completion(finished[r.request_id], r.params.stop) for r in requests]

    def close(self) -> None:
        """End the processes of other ranks (`tensor_parallel_size`); leaving `with` calls it."""
        self.engine.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: AnyPrompt, chat: bool) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        messages = _as_messages(prompt)
        if not isinstance(prompt, str) and messages is None:
            return Prompt([int(token_id) for token_id in cast(Sequence[int], prompt)])
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise InvalidRequest("prompts", "this checkpoint has no tokenizer; pass token ids")
        if messages is not None:
            return Prompt(tokenizer.encode_messages(json.dumps(messages)))
        text = cast(str, prompt)
        return Prompt(tokenizer.encode_chat(text) if chat else tokenizer.encode_text(text))

    def _completion(self, update: CanvasUpdate, stop: tuple[str, ...]) -> Completion:
        if update.error is not None:
            raise update.error
        assert update.finish_reason is not None
        tokenizer = self.engine.tokenizer
        text = tokenizer.answer(update.token_ids[: update.num_ready], stop) if tokenizer else ""
        return Completion(
            text,
            update.token_ids,
            update.confidence,
            update.finish_reason,
            update.usage,
            update.seed,
        )


def _as_list(prompts: AnyPrompt | Sequence[AnyPrompt]) -> Sequence[AnyPrompt]:
    """The prompts; a text, a conversation or token ids alone are a list of one."""
    if isinstance(prompts, str | Prompt) or (prompts and isinstance(prompts[0], Mapping | int)):
        return [cast(AnyPrompt, prompts)]
    return cast(Sequence[AnyPrompt], prompts)


def _as_messages(prompt: AnyPrompt) -> list[dict[str, str]] | None:
    if isinstance(prompt, str | Prompt) or not prompt or not isinstance(prompt[0], Mapping):
        return None
    return [dict(message) for message in cast(Sequence[Mapping[str, str]], prompt)]


def _one_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest("params", f"{len(params)} given for {count} prompts")
    return list(params)
