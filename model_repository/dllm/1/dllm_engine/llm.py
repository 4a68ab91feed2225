"""Offline use: `LLM(path).generate(prompts, params)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tqdm.auto import tqdm

from dllm_engine.config import EngineConfig
from dllm_engine.errors import InvalidRequest
from dllm_engine.loop.engine import Engine
from dllm_engine.request import CanvasUpdate, Completion, Prompt
from dllm_engine.sampling_params import SamplingParams


class LLM:
    """A diffusion language model in this process.

    Args:
        model_path: a checkpoint directory in its Hugging Face layout.
        **settings: further fields of `EngineConfig`.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        InvalidConfig: a setting is unusable.
    """

    def __init__(self, model_path: str | Path, **settings: Any) -> None:
        self.engine = Engine(EngineConfig(model_path=Path(model_path), **settings))

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        progress: bool = True,
    ) -> list[Completion]:
        """Denoise one canvas per prompt; all run together.

        Args:
            prompts: texts, token ids, or `Prompt`s with a canvas or suffix of their own.
            params: one for all prompts, or one each; None: the defaults.
            chat: ask each text as one user message in the checkpoint's chat template.
            progress: show a bar.

        Returns:
            Completions in the order of the prompts.

        Raises:
            InvalidRequest: a prompt or parameter is unusable; nothing has run then.
            RequestFailed: the engine met an error.
        """
        each = _one_per_prompt(params, len(prompts))
        requests = [
            self.engine.make_request(self._encode(prompt, chat), p)
            for prompt, p in zip(prompts, each, strict=True)
        ]
        # This thread may not be the one that loaded the model, or have run another since.
        self.engine.runner.bind_thread()
        for request in requests:
            self.engine.add(request)
        finished: dict[int, CanvasUpdate] = {}
        with tqdm(total=len(requests), desc="denoising", disable=not progress) as bar:
            while self.engine.has_work:
                for update in self.engine.step():
                    finished[update.request_id] = update
                    bar.update()
        return [self._completion(finished[r.request_id], r.params.stop) for r in requests]

    def close(self) -> None:
        """End the processes of other ranks (`tensor_parallel_size`); `with` does it too."""
        self.engine.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: str | Sequence[int] | Prompt, chat: bool) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if not isinstance(prompt, str):
            return Prompt(list(prompt))
        codec = self.engine.codec
        if codec is None:
            raise InvalidRequest("prompts", "this checkpoint has no tokenizer; pass token ids")
        return Prompt(codec.encode_chat(prompt) if chat else codec.encode_text(prompt))

    def _completion(self, update: CanvasUpdate, stop: tuple[str, ...]) -> Completion:
        if update.error is not None:
            raise update.error
        assert update.finish_reason is not None
        codec = self.engine.codec
        text = codec.answer(update.token_ids[: update.num_ready], stop) if codec else ""
        return Completion(
            text,
            update.token_ids,
            update.confidence,
            update.finish_reason,
            update.usage,
            update.seed,
        )


def _one_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest("params", f"{len(params)} given for {count} prompts")
    return list(params)
