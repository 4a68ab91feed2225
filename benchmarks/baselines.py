"""Baselines that the engine is measured against, written plainly from their definitions.

- `reference`: LLaDA's `generate`: one request after another, the whole sequence and its logits
  at every step. Runs on `PlainLlama`, without a framework, or on `LibraryLlama`, the class of
  transformers that you would use in a notebook.
- `fast_dllm`: Fast-dLLM's dual cache: at a block's start the whole sequence, with all its logits,
  then the block alone; one request after another.
- Static batching: the same over a batch of equal lengths that runs to its end.

All decode greedily: one token per step in order of confidence, or all above a threshold. The
default type is float32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.model_format import load
from tests.support.oracle import PlainConfig, checkpoint_config, checkpoint_tensors


@dataclasses.dataclass(frozen=True)
class Work:
    """The work that every system does."""

    gen_length: int
    block_length: int
    mask_id: int
    #: Also commit every position at least this sure (Fast-dLLM's parallel decoding).
    threshold: float | None = None


class PlainLlama:
    """A LLaDA in torch's own operations: linear, RMSNorm, attention; batches of equal lengths."""

    def __init__(
        self, directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.config: PlainConfig = checkpoint_config(directory)
        tensors = checkpoint_tensors(directory)
        self.tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        half = self.config.hidden_size // self.config.num_heads // 2
        frequencies = 1.0 / self.config.rope_theta ** (torch.arange(half) / half)
        angles = torch.outer(torch.arange(4096), frequencies).repeat(1, 2)
        self.cos, self.sin = (x.to(device, dtype) for x in (angles.cos(), angles.sin()))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm."""
        weight = self.tensors[name]
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of [batch, heads, rows, head_dim]."""
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * self.cos[positions] + turned * self.sin[positions]

    def forward(
        self, ids: Tensor, positions: Tensor, stored: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [batch, rows, vocabulary], and keys and values of each layer.

        With `stored`, fresh keys and values replace the stored ones at `positions`.
        """
        config = self.config
        x = self.tensors["model.embed_tokens.weight"][ids]
        batch, rows = ids.shape
        kept = []
        for i in range(config.num_layers):
            name = f"model.layers.{i}"
            normed = self.norm(x, f"{name}.input_layernorm.weight")
            q, k, v = (
                F.linear(normed, self.tensors[f"{name}.self_attn.{part}_proj.weight"])
                .view(batch, rows, -1, config.hidden_size // config.num_heads)
                .transpose(1, 2)
                for part in "qkv"
            )
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            if stored is not None:
                keys, values = stored[i]
                keys[:, :, positions], values[:, :, positions] = k, v
                k, v = keys, values
            kept.append((k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            mixed = mixed.transpose(1, 2).flatten(2)
            x = x + F.linear(mixed, self.tensors[f"{name}.self_attn.o_proj.weight"])
            normed = self.norm(x, f"{name}.post_attention_layernorm.weight")
            gate = F.silu(F.linear(normed, self.tensors[f"{name}.mlp.gate_proj.weight"]))
            up = F.linear(normed, self.tensors[f"{name}.mlp.up_proj.weight"])
            x = x + F.linear(gate * up, self.tensors[f"{name}.mlp.down_proj.weight"])
        x = self.norm(x, "model.norm.weight")
        return F.linear(x, self.tensors["lm_head.weight"]), kept


class LibraryLlama:
    """The same LLaDA as `LlamaForCausalLM` of transformers with attention in both directions."""

    def __init__(self, directory: Path) -> None:
        _, model, _ = load(directory)
        self.model = model.float().eval()

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        """Logits [batch, rows, vocabulary]."""
        return self.model(input_ids=ids, position_ids=positions.unsqueeze(0)).logits, None


@torch.inference_mode()
def reference(model: PlainLlama | LibraryLlama, prompts: Tensor, work: Work) -> Tensor:
    """LLaDA's loop over prompts [batch, length]: the whole canvas at every step."""
    x, start = _canvas(prompts, work)
    positions = torch.arange(x.shape[1], device=x.device)
    for begin in range(start, x.shape[1], work.block_length):
        block = slice(begin, begin + work.block_length)
        while _is_open(x, block, work):
            logits, _ = model.forward(x, positions)
            _commit(x, logits, positions, block, work)
    return x[:, start:]


@torch.inference_mode()
def fast_dllm(model: PlainLlama, prompts: Tensor, work: Work) -> Tensor:
    """Fast-dLLM's dual cache over prompts [batch, length]."""
    x, start = _canvas(prompts, work)
    everything = torch.arange(x.shape[1], device=x.device)
    for begin in range(start, x.shape[1], work.block_length):
        block = slice(begin, begin + work.block_length)
        logits, stored = model.forward(x, everything)
        _commit(x, logits, everything, block, work)
        stored = [(keys.clone(), values.clone()) for keys, values in stored]
        inside = everything[block]
        while _is_open(x, block, work):
            logits, _ = model.forward(x[:, block], inside, stored)
            _commit(x, logits, inside, block, work)
    return x[:, start:]


def _canvas(prompts: Tensor, work: Work) -> tuple[Tensor, int]:
    masks = prompts.new_full((len(prompts), work.gen_length), work.mask_id)
    return torch.cat([prompts, masks], dim=1), prompts.shape[1]


def _is_open(x: Tensor, block: slice, work: Work) -> bool:
    return bool((x[:, block] == work.mask_id).any())


def _commit(x: Tensor, logits: Tensor, positions: Tensor, block: slice, work: Work) -> None:
    """Commit, per row, the most confident masked position of the block or all that are sure."""
    probability = F.softmax(logits, dim=-1)
    choice = logits.argmax(dim=-1)
    confidence = probability.gather(2, choice.unsqueeze(2)).squeeze(2)
    here = x[:, positions]
    inside = (positions >= block.start) & (positions < block.stop)
    open_here = (here == work.mask_id) & inside
    best = confidence.masked_fill(~open_here, -torch.inf).argmax(dim=1, keepdim=True)
    picked = torch.zeros_like(open_here).scatter_(1, best, open_here.any(dim=1, keepdim=True))
    if work.threshold is not None:
        picked |= open_here & (confidence >= work.threshold)
    x[:, positions] = torch.where(picked, choice, here)
