"""Owns the model and the device: runs one denoising step for a set of slots."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .batch import StepBatch, build_batch
from .canvas import CanvasTable, StepResult
from .config import EngineConfig
from .decoding import Rule
from .models import ModelSpec
from .request import Prompt, SamplingParams
from .sampling import BlockStatistics, Candidates, select_commits
from .shard import ModelShard, StepInputs
from .team import ModelTeam

logger = logging.getLogger("dllm_engine")


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
        self._model = self._shard.model
        #: Rows that one step may push through the model.
        self.token_budget = self._shard.token_budget
        if isinstance(self._shard, ModelShard):
            self._shard.allocate(self._shard.plan.num_pages)
        self.plan = self._shard.plan
        logger.info("memory plan%s\n%s", " of each rank" if parallel else "", self.plan)
        self._pages = self._shard.pages
        self.table = CanvasTable.of(
            config, spec, special=self._shard.special, device=self._shard.device
        )
        logger.info("model ready device=%s ranks=%d", self._shard.device, spec.num_ranks)

    def bind_thread(self) -> None:
        """See `ModelShard.bind_thread`."""
        self._shard.bind_thread()

    def start(self, slot: int, prompt: Prompt, params: SamplingParams, pages: list[int]) -> None:
        """Lay out a new request in `slot`, with the pages that are its own from now on."""
        self.table.fill(slot, prompt, params)
        self._pages.assign(slot, pages, 2 if params.cfg_scale > 0 else 1)

    @torch.inference_mode()
    def launch(self, slots: list[int]) -> Tensor:
        """Begin a denoising step for the requests in `slots`; a GPU is still at work on return.

        No canvas changes before the whole forward pass has succeeded, and the keys and values
        that it stores are read only together with these canvases: a step that raised can be
        tried again.

        Returns:
            For `finish`.
        """
        with self._watched():
            batch = build_batch(self.table, self._pages, slots, self._shard.tile_rows)
            candidates = self._shard.candidates(StepInputs.of(batch))
            self._commit(batch, candidates)
            return self.table.advance(batch.state, slots)

    def finish(self, report: Tensor) -> StepResult:
        """Wait for the step to end."""
        try:
            with self._watched():
                return self.table.result(report)
        finally:  # a rank that has failed is the reason of whatever the device says
            self.check()

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

    def _commit(self, batch: StepBatch, candidates: Candidates) -> None:
        masked, request, column = batch.block_masked, batch.request, batch.column
        stepped = batch.state.slots
        slots, positions = stepped[request], batch.block_positions[request, column]

        def spread(values: Tensor) -> Tensor:
            """[M] values at their places in the [R, block] matrix."""
            return values.new_zeros(masked.shape).masked_scatter_(masked, values)

        confidence = spread(candidates.confidence)
        nothing = torch.zeros_like(confidence)
        leaps = Rule.LOCAL_LEAP in batch.plan.rules_in_use
        block = BlockStatistics(
            masked=masked,
            confidence=confidence,
            entropy=spread(candidates.entropy) if batch.needs_spread else nothing,
            margin=spread(candidates.margin) if batch.needs_spread else nothing,
            committed=self.table.block_confidence(batch.state, batch.block_positions)
            if leaps
            else nothing,
        )
        picked = select_commits(block, batch.plan)[request, column]
        if candidates.credits is not None:
            self.table.keep_credits(slots, column, candidates.credits)
        self.table.commit(
            stepped, slots, positions, picked, candidates.token, candidates.confidence
        )
