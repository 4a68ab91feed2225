"""Owns the model and the device: runs one denoising step for a set of slots."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .batch import StepBatch, build_batch
from .canvas import CanvasTable, StepResult
from .config import EngineConfig
from .errors import InvalidConfig
from .models import DiffusionModel, ModelSpec, load_model
from .sampling import (
    BlockStatistics,
    Candidates,
    SpecialTokens,
    sample_candidates,
    select_commits,
)

logger = logging.getLogger("dllm_engine")


def resolve_device(config: EngineConfig) -> tuple[str, torch.dtype]:
    """Device and number type that `config` means on this machine.

    Raises:
        InvalidConfig: the device does not exist here.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidConfig(f"DLLM_DEVICE: {device} asked for, but no CUDA device is visible")
    name = config.dtype
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return device, getattr(torch, name)


class Runner:
    """A loaded model and the canvases it works on.

    Raises:
        CheckpointError: the weights do not fit the config.
        InvalidConfig: the device does not exist.
    """

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, stop_token_ids: tuple[int, ...]
    ) -> None:
        self._device, dtype = resolve_device(config)
        self._budget_bytes = config.logits_budget_mb * 2**20
        self._model: DiffusionModel = load_model(
            config.model_path, spec, device=self._device, dtype=dtype, progress=_log_progress
        )
        self.table = CanvasTable(
            config.max_num_seqs,
            spec.max_model_len,
            special=SpecialTokens(
                mask=spec.mask_token_id,
                eos=torch.tensor(spec.eos_token_ids, dtype=torch.int64, device=self._device),
                stop=torch.tensor(stop_token_ids, dtype=torch.int64, device=self._device),
            ),
            device=self._device,
        )
        logger.info("model ready device=%s dtype=%s", self._device, dtype)

    @torch.inference_mode()
    def run(self, slots: list[int]) -> tuple[list[int], StepResult]:
        """One denoising step for the requests in `slots`.

        Nothing is written before the whole forward pass has succeeded, so a step that raised
        can be tried again.

        Returns:
            The slots in the order of the result, and the result.
        """
        batch = build_batch(self.table, slots, shifted=self._model.spec.shifted)
        hidden = self._masked_hidden(batch)
        candidates = sample_candidates(
            hidden,
            self._model.head_weight,
            batch.sampling,
            self.table.special,
            budget_bytes=self._budget_bytes,
            with_spread=batch.needs_spread,
        )
        self._commit(batch, candidates)
        return batch.slots.tolist(), self.table.advance(batch.slots)

    def _masked_hidden(self, batch: StepBatch) -> Tensor:
        """Head inputs of the masked positions, [M, hidden_size], guidance applied.

        The head is linear, so guiding its inputs, `u + (s + 1)(c − u)`, equals guiding the logits
        (LLaDA, generate.py) at half the cost.
        """
        hidden = self._model(batch.input_ids, batch.positions, batch.layout)
        conditional = self._model.head_input(hidden[batch.rows])
        if batch.cfg_scale is None:
            return conditional
        unconditional = self._model.head_input(hidden[batch.uncond_rows])
        scale = (batch.cfg_scale + 1).to(hidden.dtype).unsqueeze(1)
        guided = unconditional + scale * (conditional - unconditional)
        return torch.where((batch.cfg_scale > 0).unsqueeze(1), guided, conditional)

    def _commit(self, batch: StepBatch, candidates: Candidates) -> None:
        masked = batch.block_masked

        def spread(values: Tensor) -> Tensor:
            """[M] values at their places in the [R, block] matrix."""
            return values.new_zeros(masked.shape).masked_scatter_(masked, values)

        block = BlockStatistics(
            masked=masked,
            confidence=spread(candidates.confidence),
            entropy=spread(candidates.entropy),
            margin=spread(candidates.margin),
            committed=self.table.confidence[batch.slots.unsqueeze(1), batch.block_positions],
        )
        picked = select_commits(block, batch.plan)[masked]  # of the M, in row-major order
        self.table.commit(
            batch.slots[masked.nonzero(as_tuple=True)[0][picked]],
            batch.block_positions[masked][picked],
            candidates.token[picked],
            candidates.confidence[picked],
        )


def _log_progress(done: int, total: int) -> None:
    # Ten lines for a model of any size.
    if done == total or done * 10 // total != (done - 1) * 10 // total:
        logger.info("loading weights %d%%", 100 * done // total)
