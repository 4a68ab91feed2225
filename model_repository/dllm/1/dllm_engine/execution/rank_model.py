"""Holds one rank's part of the model and runs its part of a step, from input tokens to candidates.

Without tensor parallelism there is one rank, which holds everything.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.config import EngineConfig
from dllm_engine.errors import InvalidConfig
from dllm_engine.execution.devices import resolve_device
from dllm_engine.execution.graphs import (
    GRAPH_BYTES,
    LARGEST_ROWS,
    ForwardGraphs,
    cuda_recorder,
    graph_sizes,
)
from dllm_engine.memory.kv_cache import KVPages
from dllm_engine.memory.plan import (
    MemoryPlan,
    PeakMeter,
    available_bytes,
    check_weights,
    page_bytes,
    parse_limit,
)
from dllm_engine.models.base import DiffusionModel, ModelSpec, head_copy_bytes
from dllm_engine.models.loader import load_model
from dllm_engine.ops.attention import GATHER_BYTES, sequences_at_once
from dllm_engine.ops.dispatch import Operations, choose_operations
from dllm_engine.ops.head_types import Filters, HeadOptions
from dllm_engine.ops.layout import (
    FlatLayout,
    FlatSelection,
    LayerPages,
    Layout,
    PackedLayout,
    PagedGroup,
)
from dllm_engine.ops.rows import ROW_MULTIPLE
from dllm_engine.ops.transfer import UPLOAD_BYTES
from dllm_engine.parallel.group import Group
from dllm_engine.sampling.candidates import sample_candidates
from dllm_engine.sampling.credit import LISTED
from dllm_engine.sampling.full_logits import least_bytes
from dllm_engine.sampling.log_probs import TokenLogProbs, token_log_probs
from dllm_engine.sampling.rows import Candidates, SpecialTokens
from dllm_engine.state.batch import StepInputs
from dllm_engine.state.canvas import LONGEST_BLOCK, CanvasTable
from dllm_engine.structured.best_text import Span

logger = logging.getLogger("dllm_engine")

#: Default token budgets: enough rows to keep the device busy, few enough for a short step.
CPU_TOKEN_BUDGET = 2048
GPU_TOKEN_BUDGET = 16384
#: Chunks of prompts that fill a step's token budget.
CHUNKS_PER_STEP = 4
#: Rows of the shortest chunk.
LEAST_CHUNK = 32


class RankModel:
    """A loaded model, or a rank's part of one, with its keys and values.

    Every method is a collective call of all ranks in `group`, bounded by the time-out of a step.
    `loaded` is called before the first one, and may wait until all ranks have loaded their parts.

    Raises:
        CheckpointError: the weights do not fit the config.
        InvalidConfig: the device does not exist, or the model does not fit into its memory.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        stop_token_ids: tuple[int, ...],
        group: Group | None = None,
        loaded: Callable[[], None] | None = None,
    ) -> None:
        self._config, self._spec = config, spec
        self._stop_token_ids = stop_token_ids
        device, self._dtype = resolve_device(config)
        self.device = device if group is None else group.device
        self.bind_thread()
        self._budget_bytes = config.logits_budget_mb * 2**20
        on_cpu = self.device == "cpu"
        #: Rows that one step may push through the model.
        self.token_budget = config.max_num_batched_tokens or (
            CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET
        )
        #: Rows of a prompt that a step of a block-wise model computes at once: several requests'
        #: chunks, and the steps of others, fit into one step.
        self.chunk = max(LEAST_CHUNK, self.token_budget // CHUNKS_PER_STEP)
        available = available_bytes(self.device)
        limit = parse_limit(config.memory_limit, available)
        if on_cpu:  # ranks share a CPU's memory, while each has its own GPU
            available, limit = available // spec.num_ranks, limit // spec.num_ranks
        self._operations = operations = choose_operations(
            config.kernels, self.device, self._dtype, batch_invariant=config.batch_invariant
        )
        #: Rows per tile of the flat layouts that kernels take; None: layouts are grouped.
        self.block_m = operations.block_m(spec.num_heads, spec.num_kv_heads)
        weights = spec.weight_bytes(self._dtype.itemsize, config.quantization)
        weights += head_copy_bytes(
            spec, device=self.device, dtype=self._dtype, operations=operations
        )
        check_weights(weights, limit)
        self.model: DiffusionModel = load_model(
            config.model_path,
            spec,
            device=self.device,
            dtype=self._dtype,
            progress=_log_progress,
            group=group,
            operations=operations,
            quantization=config.quantization,
        )
        if loaded is not None:
            loaded()
        self.special = SpecialTokens(
            mask=spec.mask_token_id,
            eos=torch.tensor(spec.eos_token_ids, dtype=torch.int64, device=self.device),
            stop=torch.tensor(stop_token_ids, dtype=torch.int64, device=self.device),
        )
        activations = self._peak_activations(self._most_rows())
        if self.block_m is None:
            activations += self._peak_gathered(operations)
        self._graph_sizes = graph_sizes(largest_graph(config, operations, self.device, group))
        needs_pages = config.cache != "none" or spec.blocks is not None
        graphs = len(self._graph_sizes) * GRAPH_BYTES
        if self._graph_sizes:
            graphs += self._peak_activations(self._graph_sizes[-1])
        #: How this rank's memory is shared out.
        self.plan = MemoryPlan(
            device=self.device,
            available=available,
            limit=limit,
            weights=weights,
            requests=self._request_bytes(),
            activations=activations,
            logits=max(self._budget_bytes, least_bytes(spec.vocab_size, self._dtype.itemsize)),
            graphs=graphs,
            page=page_bytes(spec, config.kv_page_size, self._dtype.itemsize),
            page_size=config.kv_page_size,
        ).with_pages(spec.max_model_len, config.max_num_seqs, needs_pages=needs_pages)
        self.pages: KVPages
        self._layer_pages: list[LayerPages] = []
        #: Head inputs of the masked positions, kept from `candidates` to `log_probs`.
        self._sampled_hidden: Tensor | None = None
        #: Recorded forward passes, once `allocate` has made them.
        self.graphs: ForwardGraphs | None = None

    def bind_thread(self) -> None:
        """Make this rank's GPU current in the calling thread; needed on every thread that steps.

        Kernels in the Triton language and CUDA graphs run on the current device, wherever their
        tensors are; in a new thread that is the first GPU.
        """
        device = torch.device(self.device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    def allocate(self, num_pages: int) -> None:
        """Allocate the pool of keys and values; at most as many pages as planned."""
        self.plan = dataclasses.replace(self.plan, num_pages=num_pages)
        self.pages = KVPages.allocate(
            self._spec,
            num_pages=num_pages,
            page_size=self._config.kv_page_size,
            num_slots=self._config.max_num_seqs,
            device=self.device,
            dtype=self._dtype,
        )
        self._layer_pages = [
            LayerPages(keys, values)
            for keys, values in zip(self.pages.keys, self.pages.values, strict=True)
        ]
        if self._graph_sizes and self.block_m:
            with torch.inference_mode():
                self.graphs = ForwardGraphs(
                    self.model,
                    self._layer_pages,
                    sizes=self._graph_sizes,
                    block_m=self.block_m,
                    max_sequences=2 * self._config.max_num_seqs,
                    max_pages=self.pages.table.shape[2],
                    record=cuda_recorder(),
                )
        if self._operations.kernels:
            self._compile_layers()
            self._compile_head()

    @torch.inference_mode()
    def _compile_layers(self) -> None:
        """Compile the layers' kernels now, so that the first request does not wait for it."""
        # Imported here, since the package triton is optional.
        from dllm_engine.ops.kernels.selection import candidate_sizes

        assert self.block_m is not None
        nothing = torch.zeros(ROW_MULTIPLE, dtype=torch.int64, device=self.device)
        plain = FlatLayout.of([ROW_MULTIPLE], self.block_m, self.device)
        plain = dataclasses.replace(plain, slot_mapping=nothing - 1)  # no row is stored
        layouts = [plain, dataclasses.replace(plain, key_limits=nothing + 1)]
        if self._spec.blocks is None:
            none = torch.zeros_like(plain.query_lens)  # the selection is empty
            layouts = [
                dataclasses.replace(
                    plain, selection=FlatSelection(none, none, none, none, none, candidates)
                )
                for candidates in candidate_sizes(self._spec.max_model_len)
            ]
        for layout in layouts:
            hidden = self.model(nothing, nothing, layout, pages=self._layer_pages, depth=1)
        self.model.head_input(hidden)

    @torch.inference_mode()
    def _compile_head(self) -> None:
        """Compile every form of the head's kernel now, as `_compile_layers` does."""
        nothing = torch.zeros(1, device=self.device)
        keys = nothing.long()
        hidden = torch.zeros(1, self._spec.hidden_size, device=self.device, dtype=self._dtype)
        for noisy, needs_entropy in itertools.product((False, True), repeat=2):
            options = HeadOptions(
                mask=self.special.mask,
                eos=self.special.eos,
                stop=self.special.stop,
                logits_eos_inf=None,
                confidence_eos_eot_inf=None,
                inverse_temperature=nothing if noisy else None,
                keys=keys if noisy else None,
                needs_entropy=needs_entropy,
            )
            self._operations.head_statistics(self.model.head, hidden, options, None)
        self._operations.head_statistics(
            self.model.head, hidden, options, keys.new_zeros(1, LISTED)
        )
        logits = torch.zeros(1, self._spec.vocab_size, device=self.device, dtype=self._dtype)
        filters = Filters(nothing.double(), keys + 1, keys > 0, uses_top_p=True, most_top_k=1)
        self._operations.draw(logits, options, filters)

    @torch.inference_mode()
    def candidates(self, inputs: StepInputs, spans: Sequence[Span] = ()) -> Candidates:
        """Choose a token for each masked position of the step, with its confidence.

        Args:
            inputs: the step.
            spans: of the positions that automata decide; given to the first rank alone.
        """
        if not len(inputs.rows):  # nothing but prompts
            self._hidden(inputs, inputs.rows)
            nothing = inputs.sampling.temperature.to(torch.float32)
            return Candidates(inputs.rows, nothing, nothing, nothing)
        hidden = self._masked_hidden(inputs)
        if inputs.num_log_probs:
            self._sampled_hidden = hidden
        return sample_candidates(
            hidden,
            self.model.head,
            inputs.sampling,
            self.special,
            budget_bytes=self._budget_bytes,
            needs_entropy=inputs.needs_entropy,
            credits=inputs.credits,
            constrained=inputs.constrained,
            spans=spans,
            read_tokens=inputs.read_tokens,
        )

    @torch.inference_mode()
    def log_probs(self, rows: Tensor, tokens: Tensor, num_top: int) -> TokenLogProbs:
        """Compute log-probabilities of some masked positions of the step that `candidates` ran.

        Args:
            rows, tokens: [P] int64; which of the masked positions, and a token of each.
            num_top: how many of the most probable tokens to list.
        """
        hidden, self._sampled_hidden = self._sampled_hidden, None
        assert hidden is not None
        return token_log_probs(
            hidden[rows],
            self.model.head,
            tokens,
            mask=self.special.mask,
            num_top=num_top,
            budget_bytes=self._budget_bytes,
        )

    def _masked_hidden(self, inputs: StepInputs) -> Tensor:
        """Compute the head inputs of the masked positions, with guidance: [M, hidden_size].

        The head is linear, so guiding its inputs, `u + (s + 1)(c − u)`, equals guiding the logits
        (LLaDA, generate.py) at half the cost.
        """
        wanted = inputs.rows
        if inputs.cfg_scale is not None:
            wanted = torch.cat([inputs.rows, inputs.uncond_rows])
        hidden = self._hidden(inputs, wanted)
        if inputs.cfg_scale is None:
            return hidden
        conditional, unconditional = hidden.chunk(2)
        scale = (inputs.cfg_scale + 1).to(hidden.dtype).unsqueeze(1)
        guided = unconditional + scale * (conditional - unconditional)
        return torch.where((inputs.cfg_scale > 0).unsqueeze(1), guided, conditional)

    def _hidden(self, inputs: StepInputs, wanted: Tensor) -> Tensor:
        """Compute the head inputs of the `wanted` rows."""
        if self.graphs is not None and isinstance(inputs.layout, FlatLayout):
            hidden = self.graphs.run(inputs.input_ids, inputs.positions, inputs.layout)
            if hidden is not None:
                return hidden[wanted]
        missing = 0 if len(wanted) else ROW_MULTIPLE
        hidden = self.model(
            inputs.input_ids,
            inputs.positions,
            inputs.layout,
            pages=self._layer_pages,
            wanted=F.pad(wanted, (0, -len(wanted) % ROW_MULTIPLE or missing)),
        )
        return self.model.head_input(hidden)[: len(wanted)]

    def _most_rows(self) -> int:
        """Count the rows of the largest step."""
        if self._spec.blocks is not None:  # no request takes more than a chunk or the budget
            return max(self.token_budget, self.chunk, LONGEST_BLOCK)
        # Twice, for a request with guidance.
        return max(2 * self._spec.max_model_len, self.token_budget)

    def _request_bytes(self) -> int:
        """Count the bytes of the canvas table, in which all slots are equal, and of uploads.

        Only rank 0 has a table; but every rank has as many pages as the one with least memory.
        """
        one = dataclasses.replace(self._config, max_num_seqs=1)
        table = CanvasTable.of(
            one, self._spec, self._stop_token_ids, device=self.device, chunk=self.chunk
        )
        uploads = 0 if self.device == "cpu" else 2 * UPLOAD_BYTES  # two steps may be in flight
        return self._config.max_num_seqs * table.num_bytes + uploads

    @torch.inference_mode()
    def _peak_activations(self, rows: int) -> int:
        """Measure the bytes of a step of `rows` rows, in the longest sequences, without logits.

        It runs one layer: layers run one after another in the same memory, so one shows the peak
        of all.
        """
        longest = min(self._spec.max_model_len, rows)
        lengths = [longest] * (rows // longest) + [rows % longest] * (rows % longest > 0)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        with PeakMeter(self.device) as meter:
            layout: Layout
            if self.block_m is not None:
                layout = FlatLayout.of(lengths, self.block_m, self.device)
            else:
                layout = PackedLayout.of(lengths)
                if self._spec.blocks is not None:  # with `none`, rows have limits
                    mask = torch.ones(1, 1, longest, longest, dtype=torch.bool, device=self.device)
                    fresh = [dataclasses.replace(g, mask=mask) for g in layout.fresh[:1]]
                    layout = dataclasses.replace(layout, fresh=(*fresh, *layout.fresh[1:]))
            self.model(torch.zeros_like(positions), positions, layout, depth=1)
        return meter.peak

    @torch.inference_mode()
    def _peak_gathered(self, operations: Operations) -> int:
        """Measure the bytes that attention to stored rows needs more than to fresh ones.

        It takes two kinds of sequences of the longest length: one with all rows as queries (of a
        block-wise model: with a chunk of them, each with a limit), and as many single-row ones as
        run at once.
        """
        spec, longest = self._spec, self._spec.max_model_len
        blocks, widest, mask = spec.blocks, longest, None
        heads, kv_heads = (n // spec.num_ranks for n in (spec.num_heads, spec.num_kv_heads))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, spec.head_dim, device=self.device, dtype=self._dtype)

        q, fresh = zeros(widest, heads), zeros(widest, kv_heads)
        page = zeros(1, self._config.kv_page_size, kv_heads)
        pages = LayerPages(page, page)
        num_pages = -(-longest // self._config.kv_page_size)
        if blocks is not None:
            widest = min(longest, max(self.chunk, LONGEST_BLOCK))
            keys = num_pages * self._config.kv_page_size
            mask = torch.ones(1, 1, widest, keys, dtype=torch.bool, device=self.device)
        whole = PagedGroup.of(1, widest, num_pages, self.device)
        whole = dataclasses.replace(whole, kv_mask=mask)
        single = PagedGroup.of(1, 1, num_pages, self.device)
        count = sequences_at_once(q, single, pages)
        narrow = PagedGroup.of(count, 1, num_pages, self.device)
        layout = PackedLayout(widest, (), (whole, narrow))
        with PeakMeter(self.device) as meter:
            operations.packed_attention(q, fresh, fresh, layout, pages)
        return max(meter.peak, GATHER_BYTES[torch.device(self.device).type])


def largest_graph(
    config: EngineConfig, operations: Operations, device: str, group: Group | None
) -> int:
    """Return the rows of the largest step to replay from a graph; 0: no graphs.

    Raises:
        InvalidConfig: graphs are configured and not possible.
    """
    possible = operations.kernels and device.startswith("cuda") and group is None
    if config.cuda_graph_rows is None:
        return LARGEST_ROWS if possible else 0
    if config.cuda_graph_rows and not possible:
        raise InvalidConfig(
            "DLLM_CUDA_GRAPH_ROWS: graphs need kernels (DLLM_KERNELS) on a GPU, and a model that "
            f"is not split over ranks; set 0, or nothing, on {device}"
        )
    return config.cuda_graph_rows


def _log_progress(done: int, total: int) -> None:
    # At most ten lines for a model of any size.
    if done == total or done * 10 // total != (done - 1) * 10 // total:
        logger.info("loading weights %d%%", 100 * done // total)
