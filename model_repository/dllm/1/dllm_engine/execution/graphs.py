"""Records the forward pass of small steps once per size, and replays it as one launch.

A step of a few hundred rows is some ten kernels a layer, each shorter than the time the host takes
to launch it. A CUDA graph launches them together. Its addresses and shapes are fixed, so a step is
copied into buffers of the next larger size; the padding is sequences without rows, and rows that
are not stored.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm_engine.models.base import DiffusionModel
from dllm_engine.ops.layout import FlatLayout, LayerPages

logger = logging.getLogger("dllm_engine")

#: Runs some work, and returns a function that repeats it.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]

#: Rows of the largest graph by default: from about here on, a kernel takes a GPU longer than its
#: launch takes the host.
LARGEST_ROWS = 512
#: Device memory that a recorded graph takes besides its activations.
GRAPH_BYTES = 16 * 2**20
#: Tensors of a `FlatLayout` with an entry per sequence, and per tile.
_SEQUENCES = ("query_starts", "query_lens", "kv_lens", "block_tables")
_TILES = ("tile_sequence", "tile_row")
#: A limit beyond every key.
_NO_LIMIT = 2**31


def graph_sizes(largest: int) -> list[int]:
    """List the rows of each graph up to `largest`: 16 · 2ⁿ and 48 · 2ⁿ, ascending."""
    powers = [16 * 2**n for n in range(largest.bit_length())]
    return sorted(size for size in {*powers, *(3 * size for size in powers)} if size <= largest)


def cuda_recorder() -> Recorder:
    """Make a recorder of CUDA graphs that share one memory pool, since only one runs at a time."""
    pool = torch.cuda.graph_pool_handle()
    # All graphs use the same streams: only the stream that freed memory can reuse it.
    first, recorded = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(work: Callable[[], None]) -> Callable[[], None]:
        # The first run compiles kernels and sets up libraries outside the recording.
        first.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(first):
            work()
        torch.cuda.current_stream().wait_stream(first)
        graph = torch.cuda.CUDAGraph()
        # Calls of other threads do not belong to the recording.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=pool, stream=recorded, capture_error_mode=mode):
            work()
        return graph.replay

    return record


class ForwardGraphs:
    """Holds and replays the recorded forward passes of one model.

    Args:
        pages: stored keys and values of each layer; graphs hold their addresses.
        sizes: rows of each graph, ascending.
        block_m: see `FlatLayout`.
        max_sequences: the most that a step may have.
        max_pages: pages of the longest sequence.
        record: runs some work and returns its replay.
    """

    def __init__(
        self,
        model: DiffusionModel,
        pages: Sequence[LayerPages],
        *,
        sizes: list[int],
        block_m: int,
        max_sequences: int,
        max_pages: int,
        record: Recorder,
    ) -> None:
        device = model.embedding.device
        self._model, self._pages = model, pages
        self._block_m, self._max_sequences = block_m, max_sequences
        self._sizes = sizes

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        rows = sizes[-1]
        sequences, tiles = self._sequences(rows), self._tiles(rows)
        self._input_ids, self._positions = numbers(rows), numbers(rows)
        self._slot_mapping = torch.full_like(self._input_ids, -1)
        #: Limits of keys; None: the model's rows have none.
        self._key_limits: Tensor | None = None
        if model.spec.blocks is not None:
            self._key_limits = torch.full_like(self._input_ids, _NO_LIMIT)
        self._layout = FlatLayout(
            block_m=block_m,
            query_starts=numbers(sequences),
            query_lens=numbers(sequences),
            kv_lens=numbers(sequences),
            block_tables=numbers(sequences, max_pages),
            tile_sequence=numbers(tiles),
            tile_row=numbers(tiles),
            slot_mapping=self._slot_mapping,
        )
        self._hidden = torch.zeros(
            rows, model.spec.hidden_size, dtype=model.embedding.dtype, device=device
        )
        # Records the largest first: the memory it frees is enough for each of the others.
        self._replay = {
            size: record(functools.partial(self._forward, size)) for size in reversed(sizes)
        }
        logger.info("recorded forward passes of %s rows", ", ".join(map(str, sizes)))

    def run(self, input_ids: Tensor, positions: Tensor, layout: FlatLayout) -> Tensor | None:
        """Run the forward pass of a step; returns the head's inputs: [rows, hidden_size].

        They are valid until the next call. None: no graph is large enough, or the step stores a
        selection, whose launches depend on the step.
        """
        rows = len(input_ids)
        index = bisect.bisect_left(self._sizes, rows)
        if index == len(self._sizes) or layout.selection is not None:
            return None
        size = self._sizes[index]
        mine = self._layout
        for buffer, values in (
            (self._input_ids, input_ids),
            (self._positions, positions),
            *((getattr(mine, name), getattr(layout, name)) for name in _SEQUENCES + _TILES),
            (self._slot_mapping, layout.slot_mapping),
        ):
            buffer[tuple(map(slice, values.shape))] = values
        if self._key_limits is not None:
            limits = layout.key_limits
            self._key_limits[:rows] = _NO_LIMIT if limits is None else limits
        # The buffers hold an earlier step's values behind these; four settings disable them. The
        # step's surplus tiles belong to its first missing sequence, so that one must be empty too.
        self._slot_mapping[rows:size] = -1
        missing = slice(len(layout.query_lens), self._sequences(size))
        mine.query_lens[missing] = 0
        mine.kv_lens[missing] = 0
        mine.tile_sequence[len(layout.tile_sequence) : self._tiles(size)] = self._max_sequences
        self._replay[size]()
        return self._hidden[:rows]

    def _sequences(self, rows: int) -> int:
        return min(rows, self._max_sequences)

    def _tiles(self, rows: int) -> int:
        return rows // self._block_m + self._sequences(rows)

    def _forward(self, size: int) -> None:
        layout = dataclasses.replace(
            self._layout,
            slot_mapping=self._slot_mapping[:size],
            key_limits=None if self._key_limits is None else self._key_limits[:size],
            **{name: getattr(self._layout, name)[: self._sequences(size)] for name in _SEQUENCES},
            **{name: getattr(self._layout, name)[: self._tiles(size)] for name in _TILES},
        )
        hidden = self._model(
            self._input_ids[:size], self._positions[:size], layout, pages=self._pages
        )
        self._hidden[:size] = self._model.head_input(hidden)
