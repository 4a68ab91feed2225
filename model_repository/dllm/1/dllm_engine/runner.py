"""Owns the model and the device: runs one denoising step for a set of slots."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import StepBatch, build_batch
from .cache import KVPages
from .canvas import CanvasTable, StepResult
from .config import EngineConfig
from .errors import InvalidConfig
from .memory import PeakMeter, available_bytes, check_weights, parse_limit, plan_memory
from .models import DiffusionModel, ModelSpec, load_model
from .ops import LayerPages, PackedLayout
from .request import Prompt, SamplingParams
from .sampling import (
    BlockStatistics,
    Candidates,
    SpecialTokens,
    sample_candidates,
    select_commits,
)
from .sampling.rows import ROW_MULTIPLE

logger = logging.getLogger("dllm_engine")

#: Token budgets where none is set: enough rows to keep the device busy, few enough that a step is
#: short.
CPU_TOKEN_BUDGET = 2048
GPU_TOKEN_BUDGET = 16384


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
        on_cpu = self._device == "cpu"
        #: Rows that one step may push through the model.
        self.token_budget = config.max_num_batched_tokens or (
            CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET
        )
        available = available_bytes(self._device)
        limit = parse_limit(config.memory_limit, available)
        weights = check_weights(spec, limit=limit, element_size=dtype.itemsize)
        self._model: DiffusionModel = load_model(
            config.model_path, spec, device=self._device, dtype=dtype, progress=_log_progress
        )
        self.plan = plan_memory(
            spec,
            device=self._device,
            available=available,
            memory_limit=config.memory_limit,
            weights=weights,
            activations=self._peak_activations(spec),
            logits=self._budget_bytes,
            page_size=config.kv_page_size,
            element_size=dtype.itemsize,
            max_num_seqs=config.max_num_seqs,
            needs_pages=config.cache != "none",
        )
        logger.info("memory plan\n%s", self.plan)
        self._pages = KVPages.allocate(
            num_layers=spec.num_layers,
            num_pages=self.plan.num_pages,
            page_size=config.kv_page_size,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            num_slots=config.max_num_seqs,
            max_rows=spec.max_model_len,
            device=self._device,
            dtype=dtype,
        )
        self._layer_pages = [
            LayerPages(keys, values)
            for keys, values in zip(self._pages.keys, self._pages.values, strict=True)
        ]
        self.table = CanvasTable(
            config.max_num_seqs,
            spec.max_model_len,
            special=SpecialTokens(
                mask=spec.mask_token_id,
                eos=torch.tensor(spec.eos_token_ids, dtype=torch.int64, device=self._device),
                stop=torch.tensor(stop_token_ids, dtype=torch.int64, device=self._device),
            ),
            shifted=spec.shifted,
            device=self._device,
        )
        logger.info("model ready device=%s dtype=%s", self._device, dtype)

    @torch.inference_mode()
    def _peak_activations(self, spec: ModelSpec) -> int:
        """Bytes that the largest step takes besides logits: one layer is run on that many rows.

        Layers run one after another in the same memory, so one shows the peak of all.
        """
        longest = spec.max_model_len
        lengths = [longest] * max(2, self.token_budget // longest)  # a request and its twin
        positions = torch.arange(longest, device=self._device).repeat(len(lengths))
        with PeakMeter(self._device) as meter:
            layout = PackedLayout.of(lengths)
            self._model(torch.zeros_like(positions), positions, layout, depth=1)
        return meter.peak

    def start(self, slot: int, prompt: Prompt, params: SamplingParams, pages: list[int]) -> None:
        """Lay out a new request in `slot`, with the pages that are its own from now on."""
        self.table.fill(slot, prompt, params)
        self._pages.assign(slot, pages, 2 if params.cfg_scale > 0 else 1)

    @torch.inference_mode()
    def run(self, slots: list[int]) -> tuple[list[int], StepResult]:
        """One denoising step for the requests in `slots`.

        No canvas changes before the whole forward pass has succeeded, and the keys and values
        that it stores are read only together with these canvases: a step that raised can be
        tried again.

        Returns:
            The slots in the order of the result, and the result.
        """
        batch = build_batch(self.table, self._pages, slots)
        hidden = self._masked_hidden(batch)
        candidates = sample_candidates(
            hidden,
            self._model.head,
            batch.sampling,
            self.table.special,
            budget_bytes=self._budget_bytes,
            with_spread=batch.needs_spread,
            credits=batch.credits,
        )
        self._commit(batch, candidates)
        return batch.slots.tolist(), self.table.advance(batch.slots)

    def _masked_hidden(self, batch: StepBatch) -> Tensor:
        """Head inputs of the masked positions, [M, hidden_size], guidance applied.

        The head is linear, so guiding its inputs, `u + (s + 1)(c − u)`, equals guiding the logits
        (LLaDA, generate.py) at half the cost.
        """
        wanted = batch.rows
        if batch.cfg_scale is not None:
            wanted = torch.cat([batch.rows, batch.uncond_rows])
        hidden = self._model(
            batch.input_ids,
            batch.positions,
            batch.layout,
            pages=self._layer_pages,
            wanted=F.pad(wanted, (0, -len(wanted) % ROW_MULTIPLE)),
        )
        hidden = self._model.head_input(hidden)[: len(wanted)]
        if batch.cfg_scale is None:
            return hidden
        conditional, unconditional = hidden.chunk(2)
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
        if candidates.credits is not None:
            request = masked.nonzero(as_tuple=True)[0]
            self.table.keep_credits(
                batch.slots[request], batch.block_positions[masked], candidates.credits
            )
        self.table.commit(
            batch.slots,
            batch.slots[masked.nonzero(as_tuple=True)[0][picked]],
            batch.block_positions[masked][picked],
            candidates.token[picked],
            candidates.confidence[picked],
        )


def _log_progress(done: int, total: int) -> None:
    # Ten lines for a model of any size.
    if done == total or done * 10 // total != (done - 1) * 10 // total:
        logger.info("loading weights %d%%", 100 * done // total)
