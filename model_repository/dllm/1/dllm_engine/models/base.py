"""The transformer that all model families share, over packed rows.

LLaDA is a Llama, Dream a Qwen2, SDAR a Qwen3, each with another mask. They differ in the names of
tensors, in biases, norms and rotary embedding, in whether logits are shifted, and in which tokens
see which. These differences are data: `ModelSpec`, and a table of tensor names in each family's
module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_engine.errors import InvalidConfig
from dllm_engine.ops.dispatch import TORCH, Operations
from dllm_engine.ops.head import Head
from dllm_engine.ops.layout import LayerPages, Layout
from dllm_engine.ops.linear import GatedLinear, Linear
from dllm_engine.ops.quantization import quantized_bytes
from dllm_engine.ops.rotary import Rope, RotaryTable
from dllm_engine.parallel.group import Group
from dllm_engine.parallel.head import SlicedHead

#: Matrices that are split over ranks, and the dimension: the outputs (0) of projections that read
#: the residual, the inputs (1) of projections that add to it.
_SPLIT = {"qkv": 0, "gate_up": 0, "head_weight": 0, "out": 1, "down": 1}
#: Weights to quantise: the layers' linear maps, but not embedding, norms and head.
_QUANTIZED = (".qkv.weight", ".out.weight", ".gate_up.weight", ".down.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockAttention:
    """How a block-wise model reads and writes: no token sees a later block.

    A finished block's keys and values are final. All blocks have `block_length` tokens, but the
    first may begin, and the last may end, with tokens of a prompt.
    """

    #: Tokens per block that the checkpoint was trained with.
    block_length: int
    #: Where blocks are counted from: position 0, so that the prompt's end shares a block with the
    #: answer's start, or the end of the prompt.
    origin: Literal["absolute", "prompt_end"] = "absolute"
    #: Whether tokens of the prompt and of finished blocks see no later token at all; else they see
    #: their whole block. Tokens of the active block see their whole block in either case.
    prompt_causal: bool = False
    #: Whether the hidden state at i predicts the token at i + 1, both in one block.
    shift_in_block: bool = False
    #: Whether a new block begins with the token that the last row of the block before it predicts,
    #: from the pass that makes that block's keys and values final.
    first_token_given: bool = False
    #: Parts of a block that are decoded left to right, in tokens; None: the block is one part.
    sub_block_length: int | None = None
    #: The family's own rule: commit what is more confident than this, …
    threshold: float
    #: … or exactly as confident.
    threshold_inclusive: bool = False
    #: If fewer pass: commit as many of the most confident as the schedule asks for; else only one.
    floor_is_schedule: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's sizes and special tokens, read from its config.json."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    #: Width of one attention head.
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_model_len: int
    mask_token_id: int
    #: End-of-text tokens named in the config files.
    eos_token_ids: tuple[int, ...]
    qkv_bias: bool
    #: Biases of the attention's output, and of the MLP's three maps.
    out_bias: bool = False
    mlp_bias: bool = False
    #: Whether each head's queries and keys are normalised before they are rotated (Qwen3).
    qk_norm: bool = False
    tied_head: bool
    #: Whether the hidden state at position i predicts the token at i + 1 (Dream).
    shifted: bool
    #: None: every token sees every other one.
    blocks: BlockAttention | None = None
    #: Ranks that the model is split over (see `split`).
    num_ranks: int = 1

    def split(self, num_ranks: int) -> ModelSpec:
        """The same model, split over ranks: heads, the MLP's inner size, the head's vocabulary.

        Raises:
            InvalidConfig: some sizes are not divisible; names all of them.
        """
        sizes = {
            "attention heads": self.num_heads,
            "key/value heads": self.num_kv_heads,
            "intermediate size": self.intermediate_size,
            "vocabulary": self.vocab_size,
        }
        uneven = [f"{name} ({size})" for name, size in sizes.items() if size % num_ranks]
        if uneven:
            raise InvalidConfig(
                f"DLLM_TENSOR_PARALLEL_SIZE: must divide the checkpoint's {', '.join(uneven)}; "
                f"got {num_ranks}"
            )
        return dataclasses.replace(self, num_ranks=num_ranks)

    def weight_bytes(self, element_size: int, quantization: str = "none") -> int:
        """Bytes of one rank's weights; `element_size` bytes per number that is not quantised."""
        with torch.device("meta"):
            parameters = dict(DiffusionModel(self).named_parameters())
        return sum(
            quantized_bytes(parameter.shape, quantization)
            if quantization != "none" and is_quantizable(name)
            else parameter.numel() * element_size
            for name, parameter in parameters.items()
        )


def head_copy_bytes(
    spec: ModelSpec, *, device: str, dtype: torch.dtype, operations: Operations
) -> int:
    """Bytes that a rank's head takes besides the weights: above 0 if it is tied and packed.

    The embedding stays, since the model reads rows from it.
    """
    shape = (spec.vocab_size // spec.num_ranks, spec.hidden_size)
    weight = torch.empty((), device=device, dtype=dtype).expand(shape)  # takes no memory
    if not spec.tied_head or not Head.packs(weight, operations):
        return 0
    return weight.numel() * dtype.itemsize


def split_dim(parameter: str) -> int | None:
    """The dimension along which a parameter is split over ranks; None: it is not split."""
    if is_added_once(parameter):
        return None
    return next((_SPLIT[part] for part in parameter.split(".") if part in _SPLIT), None)


def is_added_once(parameter: str) -> bool:
    """Whether only one rank may add this parameter: the bias of a product that ranks sum up."""
    return parameter.endswith((".out.bias", ".down.bias"))


def is_quantizable(parameter: str) -> bool:
    """Whether a parameter is quantised when quantisation is on."""
    return parameter.endswith(_QUANTIZED)


def stacked_rows(spec: ModelSpec, parameter: str) -> tuple[int, ...]:
    """Rows of each projection that a parameter stacks, over all ranks; () if it stacks none."""
    kv_rows = spec.num_kv_heads * spec.head_dim
    parts = {
        "qkv": (spec.num_heads * spec.head_dim, kv_rows, kv_rows),
        "gate_up": (spec.intermediate_size, spec.intermediate_size),
    }
    return next((parts[part] for part in parameter.split(".") if part in parts), ())


class Layer(nn.Module):
    """One pre-norm block: attention, then a SwiGLU MLP. Projections of the same input are fused.

    With several ranks, each computes some of the heads and of the MLP's inner units, and their
    contributions to the residual are summed.
    """

    def __init__(self, spec: ModelSpec, group: Group | None, operations: Operations) -> None:
        super().__init__()
        self.spec = spec
        self._group = group
        self._operations = operations
        self._num_heads = spec.num_heads // spec.num_ranks
        self._num_kv_heads = spec.num_kv_heads // spec.num_ranks
        inner = spec.intermediate_size // spec.num_ranks
        qkv_size = (self._num_heads + 2 * self._num_kv_heads) * spec.head_dim
        self.attention_norm = nn.Parameter(torch.empty(spec.hidden_size))
        product, added = operations.linear, operations.add_linear
        self.qkv = Linear(spec.hidden_size, qkv_size, bias=spec.qkv_bias, product=product)
        inside, hidden = self._num_heads * spec.head_dim, spec.hidden_size
        self.out = Linear(inside, hidden, bias=spec.out_bias, product=product, added=added)
        self.mlp_norm = nn.Parameter(torch.empty(hidden))
        self.gate_up = GatedLinear(hidden, inner, product, operations.silu_mul, bias=spec.mlp_bias)
        self.down = Linear(inner, hidden, bias=spec.mlp_bias, product=product, added=added)
        if spec.qk_norm:
            self.q_norm = nn.Parameter(torch.empty(spec.head_dim))
            self.k_norm = nn.Parameter(torch.empty(spec.head_dim))
        #: Norm weights of each head that is rotated: [heads, head_dim].
        self._head_norm: Tensor | None = None

    def prepare(self) -> None:
        """Lay out the norms of queries and keys; call once after loading."""
        if self.spec.qk_norm:
            rows = [self.q_norm.expand(self._num_heads, -1)]
            rows.append(self.k_norm.expand(self._num_kv_heads, -1))
            self._head_norm = torch.cat(rows).detach()

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor, Tensor | None],
        layout: Layout,
        pages: LayerPages | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """[rows, hidden_size] to the same shape, or to [n, hidden_size] for the `wanted` rows.

        `rotation` holds the rows' cosines, sines and query scale. May overwrite `x`.
        """
        spec, do = self.spec, self._operations
        cos, sin, query_scale = rotation
        normed = do.rms_norm(x, self.attention_norm, spec.rms_norm_eps)
        heads = self.qkv(normed).view(x.shape[0], -1, spec.head_dim)
        rotated = self._num_heads + self._num_kv_heads
        turned = heads[:, :rotated]
        if self._head_norm is not None:
            turned = do.rms_norm(turned, self._head_norm, spec.rms_norm_eps)
        turned = do.apply_rotary(turned, cos, sin)
        q, k = turned[:, : self._num_heads], turned[:, self._num_heads :]
        if query_scale is not None:
            q = q * query_scale
        mixed = do.packed_attention(q, k, heads[:, rotated:], layout, pages)
        if wanted is not None:
            x, mixed = x[wanted], mixed[wanted]
        x = self._add(x, self.out, mixed)
        normed = do.rms_norm(x, self.mlp_norm, spec.rms_norm_eps)
        return self._add(x, self.down, self.gate_up(normed))

    def _add(self, residual: Tensor, projection: Linear, inner: Tensor) -> Tensor:
        """residual + projection(inner), summed over the ranks.

        May overwrite the residual.
        """
        if self._group is None:
            out: Tensor = projection(inner, residual)
            return out
        return self._group.sum(projection(inner)).add_(residual)


class DiffusionModel(nn.Module):
    """Embedding, layers, final norm and head of a masked diffusion language model.

    Args:
        spec: the model's sizes; with several ranks, this is the part of one rank.
        group: the ranks; None if there is only one, or if the model never runs.
        operations: the implementation of the layers; determines the form of layouts.
    """

    def __init__(
        self, spec: ModelSpec, group: Group | None = None, operations: Operations = TORCH
    ) -> None:
        super().__init__()
        self.spec = spec
        self._group = group
        self._operations = operations
        self.embedding = nn.Parameter(torch.empty(spec.vocab_size, spec.hidden_size))
        self.layers = nn.ModuleList(Layer(spec, group, operations) for _ in range(spec.num_layers))
        self.final_norm = nn.Parameter(torch.empty(spec.hidden_size))
        if not spec.tied_head:
            mine = spec.vocab_size // spec.num_ranks
            self.head_weight = nn.Parameter(torch.empty(mine, spec.hidden_size))
        self.head: Head
        self._rotary: RotaryTable | None = None

    def prepare(self) -> None:
        """Pack the weights and create the head; call once after loading."""
        spec, weight = self.spec, self.embedding
        # The last block of a sequence may reach beyond its end.
        spare = spec.blocks.block_length if spec.blocks else 0
        self._rotary = RotaryTable(
            spec.head_dim,
            spec.max_model_len + spare,
            spec.rope,
            device=str(weight.device),
            dtype=weight.dtype,
        )
        self.head = self._make_head()
        if not spec.tied_head:
            del self.head_weight
        for module in self.modules():
            if isinstance(module, GatedLinear | Linear):
                module.pack()
            elif isinstance(module, Layer):
                module.prepare()

    def _make_head(self) -> Head:
        weight: Tensor = self.embedding if self.spec.tied_head else self.head_weight
        if self._group is None:
            return Head(weight, self._operations)
        if self.spec.tied_head:  # each rank has the whole embedding
            weight = weight.chunk(self._group.size)[self._group.rank]
        return SlicedHead(weight, self._group, self._operations)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        layout: Layout,
        *,
        pages: Sequence[LayerPages] | None = None,
        wanted: Tensor | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Hidden states before the final norm.

        Args:
            input_ids: [rows] int64.
            positions: [rows] int64, each row's position in its own sequence.
            layout: the sequences among the rows.
            pages: stored keys and values of each layer, if the layout uses any.
            wanted: [n] int64; rows to return, all if None. For other rows the last layer computes
                keys and values alone.
            depth: layers to run, all if None.

        Returns:
            [rows, hidden_size], or [n, hidden_size].
        """
        assert self._rotary is not None, "prepare() was not called"
        rotation = (*self._rotary.at(positions), self._rotary.query_scale(positions))
        x = F.embedding(input_ids, self.embedding)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers[:depth]):
            stored = None if pages is None else pages[i]
            x = layer(x, rotation, layout, stored, wanted if i == last else None)
        return x

    def head_input(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to rows that need logits: [rows, hidden_size] to the same shape."""
        return self._operations.rms_norm(hidden, self.final_norm, self.spec.rms_norm_eps)
