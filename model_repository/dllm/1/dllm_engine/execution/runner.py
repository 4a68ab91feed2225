"""Owns the model and the device: runs one denoising step for a set of slots."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from dllm_engine.config import EngineConfig
from dllm_engine.execution.model_runner import ModelShard, StepInputs
from dllm_engine.execution.tensor_parallel import ModelTeam
from dllm_engine.models import ModelSpec
from dllm_engine.ops import Download, Upload
from dllm_engine.request import Prompt
from dllm_engine.sampling import BlockStatistics, Candidates, select_commits
from dllm_engine.sampling_params import SamplingParams
from dllm_engine.state.batch import StepBatch, build_batch
from dllm_engine.state.canvas import Blocks, CanvasTable, StepResult
from dllm_engine.state.slots import SlotState

logger = logging.getLogger("dllm_engine")

#: Rows of a step that is launched beside another on a GPU, where none are set: with half as many as
#: before each, both must still be limited by arithmetic, not by reading the weights (H100: 295).
OVERLAP_ROWS = 1024
#: Seconds after which a GPU's step is given up, where none are set.
STEP_TIMEOUT = 300.0


class Runner:
    """A loaded model and the canvases it works on.

    Raises:
        CheckpointError: the weights do not fit the config.
        InvalidConfig: the device does not exist.
    """

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, stop_token_ids: tuple[int, ...]
    ) -> None:
        parallel = spec.num_ranks > 1
        self._shard: ModelShard | ModelTeam = (ModelTeam if parallel else ModelShard)(
            config, spec, stop_token_ids
        )
        self._model, self._device = self._shard.model, self._shard.device
        #: Rows that one step may push through the model.
        self.token_budget = self._shard.token_budget
        #: Rows from which on a step is launched while another is under way; 0: never.
        self.overlap_rows = 0 if parallel else config.overlap_rows or 0
        if config.overlap_rows is None and not parallel and self._device != "cpu":
            self.overlap_rows = OVERLAP_ROWS
        #: Seconds after which a step that has not ended is to be given up; 0: never.
        self.step_timeout = config.step_timeout or 0.0
        if config.step_timeout is None and self._device != "cpu":
            self.step_timeout = STEP_TIMEOUT
        if isinstance(self._shard, ModelShard):
            self._shard.allocate(self._shard.plan.num_pages)
        self.plan = self._shard.plan
        logger.info("memory plan%s\n%s", " of each rank" if parallel else "", self.plan)
        self._pages = self._shard.pages
        self.table = CanvasTable.of(config, spec, stop_token_ids, device=self._device)
        logger.info("model ready device=%s ranks=%d", self._device, spec.num_ranks)

    def bind_thread(self) -> None:
        """See `ModelShard.bind_thread`."""
        self._shard.bind_thread()

    def start(self, slot: int, prompt: Prompt, params: SamplingParams, pages: list[int]) -> None:
        """Lay out a new request in `slot`, with the pages that are its own from now on."""
        self.table.fill(slot, prompt, params)
        self._pages.assign(slot, pages, 2 if params.cfg_scale > 0 else 1)

    @torch.inference_mode()
    def launch(self, slots: list[int]) -> Launched:
        """Begin a denoising step for the requests in `slots`; a GPU is still at work on return.

        Canvases change in `finish` alone, and the keys and values that the step stores are read
        only together with these canvases: one that raised can be tried again.

        Returns:
            For `finish`.
        """
        with self._watched():
            upload = Upload(self._device)
            batch = build_batch(self.table, self._pages, slots, upload, self._shard.block_m)
            upload.send()
            credits = None
            if batch.credit_rows is not None:
                credits = self.table.credits.read(batch.credit_rows)
            found = self._shard.candidates(StepInputs.of(batch, credits))
            tokens = torch.where(_pick(batch, found), found.token, -1).to(torch.int32)
            confidence = found.confidence.to(torch.float32)
            decoded = torch.stack([tokens, confidence.view(torch.int32)])
            if batch.credit_rows is not None and found.credits is not None:
                self.table.credits.write(batch.credit_rows, found.credits)
            return Launched(batch.state, batch.blocks, Download(decoded))

    def finish(self, launched: Launched) -> StepResult:
        """Wait for the step to end, and commit what it has decoded."""
        try:
            with self._watched():
                tokens, confidence = launched.decoded.array()
        finally:  # a rank that has failed is the reason of whatever the device says
            self.check()
        return self.table.advance(
            launched.state, launched.blocks, tokens, confidence.view(np.float32)
        )

    def wait(self) -> None:
        """Return once a GPU has done what it was asked for.

        Raises:
            torch.AcceleratorError: it is lost.
        """
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)

    def _watched(self) -> AbstractContextManager[None]:
        return self._shard.watched() if isinstance(self._shard, ModelTeam) else nullcontext()

    def check(self) -> None:
        """Raise EngineDead if a rank has failed: what was computed without it means nothing."""
        if isinstance(self._shard, ModelTeam):
            self._shard.check()

    def on_failure(self, listener: Callable[[], None]) -> None:
        """Call `listener`, on any thread, when a rank fails."""
        if isinstance(self._shard, ModelTeam):
            self._shard.on_failure(listener)

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if isinstance(self._shard, ModelTeam):
            self._shard.close()


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step that is under way."""

    #: Of the requests that take part, as they are before it.
    state: SlotState
    blocks: Blocks
    #: [2, M] int32: of each masked position the token that it is committed with, −1
    #: where it is not; and the bits of its confidence.
    decoded: Download


def _pick(batch: StepBatch, candidates: Candidates) -> Tensor:
    """Which of the masked positions the step commits: [M] bool."""

    def spread(values: Tensor) -> Tensor:
        """[M] values at their places in the [R, block] matrix."""
        matrix = values.new_zeros(batch.masked.numel()).index_copy_(0, batch.index, values)
        return matrix.view(batch.masked.shape)

    confidence = spread(candidates.confidence)
    nothing = torch.zeros_like(confidence)
    block = BlockStatistics(
        masked=batch.masked,
        confidence=confidence,
        entropy=spread(candidates.entropy) if batch.needs_entropy else nothing,
        margin=spread(candidates.margin) if batch.needs_entropy else nothing,
        committed=nothing if batch.committed is None else batch.committed,
    )
    return select_commits(block, batch.plan).flatten().index_select(0, batch.index)
