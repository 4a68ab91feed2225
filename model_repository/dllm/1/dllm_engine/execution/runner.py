"""Runs denoising steps on a device."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_engine.config import EngineConfig
from dllm_engine.execution.rank_model import RankModel
from dllm_engine.models.base import ModelSpec
from dllm_engine.ops.transfer import Array, Download, Upload
from dllm_engine.request import Prompt
from dllm_engine.sampling.commit import BlockStatistics, select_commits
from dllm_engine.sampling.log_probs import TokenLogProbs
from dllm_engine.sampling.rows import Candidates
from dllm_engine.sampling_params import SamplingParams
from dllm_engine.state.batch import StepBatch, StepInputs, build_batch
from dllm_engine.state.canvas import Canvas, CanvasTable, StepResult
from dllm_engine.state.step_plan import StepPlan
from dllm_engine.structured.best_text import Span
from dllm_engine.structured.token_automaton import TokenAutomaton
from dllm_engine.watchdog import Watchdog

logger = logging.getLogger("dllm_engine")

#: Rows of a step that is launched beside another on a GPU, where none are set: with half as many as
#: before each, both must still be limited by arithmetic, not by reading the weights (H100: 295).
OVERLAP_ROWS = 1024
#: Seconds after which a step is given up, where none are set. A slow CPU may take minutes for one.
GPU_STEP_TIMEOUT, CPU_STEP_TIMEOUT = 300.0, 3600.0


class ModelRunner:
    """Runs denoising steps for requests in numbered slots, and holds their canvases.

    This process holds the whole model; see `TensorParallelRunner` for several ranks.

    Raises:
        CheckpointError: the weights do not fit the config.
        InvalidConfig: the device does not exist.
    """

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, stop_token_ids: tuple[int, ...]
    ) -> None:
        #: The model, or the part of it that rank 0 holds.
        self.rank = self._load(config, spec, stop_token_ids)
        self._device = self.rank.device
        #: Rows that one step may push through the model.
        self.token_budget = self.rank.token_budget
        #: How memory was shared out at start.
        self.plan = self.rank.plan
        on_gpu, parallel = self._device != "cpu", spec.num_ranks > 1
        overlap_rows, step_timeout = config.overlap_rows, config.step_timeout
        if overlap_rows is None:
            overlap_rows = OVERLAP_ROWS if on_gpu and not parallel else 0
        if step_timeout is None:
            step_timeout = GPU_STEP_TIMEOUT if on_gpu else CPU_STEP_TIMEOUT
        #: Rows that are enough to launch a step while another is in flight; 0: never.
        self.overlap_rows = overlap_rows
        #: Seconds after which the engine gives up a step; 0: never.
        self.step_timeout = step_timeout
        logger.info("memory plan%s\n%s", " of each rank" if parallel else "", self.plan)
        self.table = CanvasTable.of(
            config, spec, stop_token_ids, device=self._device, chunk=self.rank.chunk
        )
        logger.info("model ready device=%s ranks=%d", self._device, spec.num_ranks)

    def _load(
        self, config: EngineConfig, spec: ModelSpec, stop_token_ids: tuple[int, ...]
    ) -> RankModel:
        model = RankModel(config, spec, stop_token_ids)
        model.allocate(model.plan.num_pages)
        self._watchdog = Watchdog(0.0, self.check)  # there is no other rank
        return model

    def start(
        self,
        slot: int,
        prompt: Prompt,
        params: SamplingParams,
        pages: list[int],
        num_cached: int = 0,
        form: TokenAutomaton | None = None,
    ) -> tuple[int, bool]:
        """Set up the canvas of a new request in `slot`; `pages` are its own from now on.

        Args:
            num_cached: tokens of the prompt whose keys and values are in `pages` already.
            form: which tokens its text may have; None: any.

        Returns:
            Rows of one sequence in its first step, and whether that is a Refresh.
        """
        self.assign(slot, pages, 2 if params.cfg_scale > 0 else 1)
        return self.table.fill(slot, prompt, params, num_cached, form)

    def assign(self, slot: int, pages: list[int], num_sequences: int = 1) -> None:
        """Set the pages of the request in `slot`."""
        self.rank.pages.assign(slot, pages, num_sequences)

    def resume(self, slot: int, pages: list[int], num_cached: int) -> tuple[int, bool]:
        """Go on with a request whose pages were taken away; arguments and result as in `start`.

        What it decoded is kept; keys and values behind the first `num_cached` tokens are computed
        again.
        """
        self.assign(slot, pages)
        return self.table.rewind(slot, num_cached)

    def tokens(self, slot: int, count: int) -> Array:
        """The first tokens of the sequence in `slot`: int64 [count]."""
        return self.table.tokens[slot, :count]

    @torch.inference_mode()
    def launch(self, slots: list[int]) -> Any:
        """Begin a denoising step for the requests in `slots`; a GPU is still busy on return.

        A step that raises can be launched again: canvases change in `finish` alone, and the keys
        and values that a step stores are read only together with them.

        Returns:
            The step, for `finish`.
        """
        with self._watchdog:
            pages, block_m = self.rank.pages, self.rank.block_m
            page_size = pages.page_size if block_m is None else None
            plan = self.table.plan_step(slots, page_size=page_size)
            upload = Upload(self._device)
            batch = build_batch(plan, pages, upload, block_m)
            upload.send()
            inputs, credit_rows = batch.inputs, batch.credit_rows
            if credit_rows is not None:
                credits = self.table.credits.read(credit_rows)
                inputs = dataclasses.replace(inputs, credits=credits)
            found = self._candidates(inputs, batch.spans)
            picked = _pick(batch, found)
            tokens = torch.where(picked, found.token, -1).to(torch.int32)
            confidence = found.confidence.to(torch.float32)
            decoded = torch.stack([tokens, confidence.view(torch.int32)])
            if credit_rows is not None and found.credits is not None:
                self.table.credits.write(credit_rows, found.credits)
            log_probs = None
            if batch.asks is not None:
                log_probs = Download(self._picked_log_probs(batch, picked, found.token))
            read = None if found.read is None else Download(found.read.to(torch.float32))
            return InflightStep(plan, Download(decoded), log_probs, read)

    def _picked_log_probs(self, batch: StepBatch, picked: Tensor, token: Tensor) -> Tensor:
        """Compute log-probabilities of the picked positions whose requests ask.

        Their number is known on the device alone, so as many rows are computed as there may be:
        rows behind the picked ones are of no use.

        Returns:
            float32 [P, 1 + 2K]; see `CanvasTable.advance`.
        """
        inputs = batch.inputs
        assert batch.asks is not None
        last = (~(picked & batch.asks)).to(torch.uint8)
        rows = last.argsort(stable=True)[: inputs.num_log_probs]
        found = self._log_probs(rows, token[rows], inputs.num_top)
        top_tokens = found.top_tokens.to(torch.int32).view(torch.float32)
        return torch.cat([found.chosen.unsqueeze(1), found.top, top_tokens], dim=1)

    def finish(self, step: Any) -> StepResult:
        """Wait for the step to end, and commit what it decoded.

        Raises:
            EngineDead: another rank failed.
        """
        assert isinstance(step, InflightStep)
        try:
            with self._watchdog:
                tokens, confidence = step.decoded.array()
                log_probs = None if step.log_probs is None else step.log_probs.array()
                read = None if step.read is None else step.read.array()
        finally:  # if a rank failed, it is the cause of any error that the device reports
            self.check()
        confidence = confidence.view(np.float32)
        return self.table.advance(step.plan, tokens, confidence, log_probs, read)

    def canvas(self, slot: int) -> Canvas:
        """A copy of the canvas in `slot`."""
        return self.table.canvas(slot)

    def wait(self) -> None:
        """Wait until the device is idle.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)

    def bind_thread(self) -> None:
        """Make the calling thread able to run steps; call it on every thread that does."""
        self.rank.bind_thread()

    def check(self) -> None:
        """Raise EngineDead if another rank has failed."""

    def on_failure(self, listener: Callable[[], None]) -> None:
        """Call `listener`, on any thread, when `check` begins to raise."""

    def close(self) -> None:
        """End the processes of other ranks."""

    def _candidates(self, inputs: StepInputs, spans: Sequence[Span]) -> Candidates:
        return self.rank.candidates(inputs, spans)

    def _log_probs(self, rows: Tensor, tokens: Tensor, num_top: int) -> TokenLogProbs:
        return self.rank.log_probs(rows, tokens, num_top)


@dataclasses.dataclass(frozen=True)
class InflightStep:
    """A step that was launched and has not ended."""

    plan: StepPlan
    #: [2, M] int32: for each masked position the token to commit, −1 for none; and the bits of
    #: its confidence.
    decoded: Download
    #: See `CanvasTable.advance`; None: no request asks.
    log_probs: Download | None
    #: [M, K] float32: log-probabilities of the tokens that requests read; None: none reads.
    read: Download | None = None


def _pick(batch: StepBatch, candidates: Candidates) -> Tensor:
    """Choose the masked positions that the step commits: [M] bool."""

    def spread(values: Tensor) -> Tensor:
        """[M] values at their places in the [R, block] matrix."""
        matrix = values.new_zeros(batch.masked.numel()).index_copy_(0, batch.index, values)
        return matrix.view(batch.masked.shape)

    confidence = spread(candidates.confidence)
    nothing = torch.zeros_like(confidence)
    block = BlockStatistics(
        masked=batch.masked,
        confidence=confidence,
        entropy=spread(candidates.entropy) if batch.inputs.needs_entropy else nothing,
        margin=spread(candidates.margin) if batch.inputs.needs_entropy else nothing,
        committed=nothing if batch.committed is None else batch.committed,
    )
    return select_commits(block, batch.commit).flatten().index_select(0, batch.index)
