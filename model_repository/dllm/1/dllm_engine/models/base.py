"""The transformer both families share, over packed rows.

LLaDA is a Llama and Dream a Qwen2 without the causal mask; they differ in names, in biased
queries, keys and values, and in whether logits are shifted. Those differences are data
(`ModelSpec`) and a table of tensor names in each family's file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import (
    GatedLinear,
    Head,
    LayerPages,
    Linear,
    PackedLayout,
    RotaryTable,
    apply_rotary,
    packed_attention,
    rms_norm,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the engine must know of a checkpoint, read from its config.json."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_model_len: int
    mask_token_id: int
    #: End of text, as the configs name it.
    eos_token_ids: tuple[int, ...]
    qkv_bias: bool
    tied_head: bool
    #: Whether the hidden state at position i predicts the token at i + 1 (Dream).
    shifted: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in DiffusionModel(self).parameters())


class Layer(nn.Module):
    """One pre-norm block: attention, then a SwiGLU MLP. Projections that share input are fused."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        qkv_size = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        self.attention_norm = nn.Parameter(torch.empty(spec.hidden_size))
        self.qkv = Linear(spec.hidden_size, qkv_size, bias=spec.qkv_bias)
        self.out = Linear(spec.num_heads * spec.head_dim, spec.hidden_size, bias=False)
        self.mlp_norm = nn.Parameter(torch.empty(spec.hidden_size))
        self.gate_up = GatedLinear(spec.hidden_size, spec.intermediate_size)
        self.down = Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: PackedLayout,
        pages: LayerPages | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """[rows, hidden_size] to the same, or to [n, hidden_size] of the `wanted` rows."""
        spec = self.spec
        normed = rms_norm(x, self.attention_norm, spec.rms_norm_eps)
        heads = self.qkv(normed).view(x.shape[0], -1, spec.head_dim)
        rotated = spec.num_heads + spec.num_kv_heads
        turned = apply_rotary(heads[:, :rotated], cos, sin)
        q, k = turned[:, : spec.num_heads], turned[:, spec.num_heads :]
        mixed = packed_attention(q, k, heads[:, rotated:], layout, pages)
        if wanted is not None:
            x, mixed = x[wanted], mixed[wanted]
        x = self.out(mixed, x)
        normed = rms_norm(x, self.mlp_norm, spec.rms_norm_eps)
        out: Tensor = self.down(self.gate_up(normed), x)
        return out


class DiffusionModel(nn.Module):
    """Embedding, layers, final norm and head of a masked diffusion language model."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Parameter(torch.empty(spec.vocab_size, spec.hidden_size))
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.final_norm = nn.Parameter(torch.empty(spec.hidden_size))
        if not spec.tied_head:
            self.head_weight = nn.Parameter(torch.empty(spec.vocab_size, spec.hidden_size))
        self.head: Head
        self._rotary: RotaryTable | None = None

    def prepare(self) -> None:
        """Bring the weights into the form they are used in; call once after loading."""
        spec, weight = self.spec, self.embedding
        self._rotary = RotaryTable(
            spec.head_dim,
            spec.max_model_len,
            spec.rope_theta,
            device=str(weight.device),
            dtype=weight.dtype,
        )
        self.head = Head(self.embedding if spec.tied_head else self.head_weight)
        if not spec.tied_head:
            del self.head_weight
        for module in self.modules():
            if isinstance(module, GatedLinear | Linear):
                module.pack()

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        layout: PackedLayout,
        *,
        pages: Sequence[LayerPages] | None = None,
        wanted: Tensor | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Hidden states before the final norm.

        Args:
            input_ids: [rows] int64.
            positions: [rows] int64, each row's place in its own sequence.
            layout: the sequences among the rows.
            pages: stored keys and values of each layer, where the layout uses any.
            wanted: [n] int64; rows to return, all if None. The last layer computes of others
                only what these attend to.
            depth: layers to run, all if None.

        Returns:
            [rows, hidden_size], or [n, hidden_size].
        """
        assert self._rotary is not None, "prepare() was not called"
        cos, sin = self._rotary.at(positions)
        x = F.embedding(input_ids, self.embedding)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers[:depth]):
            stored = None if pages is None else pages[i]
            x = layer(x, cos, sin, layout, stored, wanted if i == last else None)
        return x

    def head_input(self, hidden: Tensor) -> Tensor:
        """Final norm, for the rows that need logits: [rows, hidden_size] to the same."""
        return rms_norm(hidden, self.final_norm, self.spec.rms_norm_eps)
