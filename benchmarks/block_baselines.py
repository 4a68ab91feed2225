"""SDAR's own decoding loop in plain torch, with its cache; the engine is measured against it.

From `block_diffusion_generate` of JetAstra/SDAR (generate.py), with its rule
`low_confidence_dynamic` at temperature 0 and its known defects mended: the mask token is never
chosen, and no more positions are committed than are masked. A static batch is the same loop over
prompts of equal length; it runs until the last of them is done.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.oracle import read_tensors


@dataclasses.dataclass(frozen=True)
class BlockWork:
    """The work that every system does: a token per step, or all above the threshold."""

    gen_length: int
    block_length: int
    mask_id: int
    threshold: float


class PlainSdar:
    """An SDAR in torch's own operations, with keys and values of finished blocks kept."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.tensors = {n: t.float() for n, t in read_tensors(directory).items()}
        half = self.config["head_dim"] // 2
        frequencies = 1.0 / self.config["rope_theta"] ** (torch.arange(half) / half)
        angles = torch.outer(torch.arange(4096), frequencies).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(
        self, ids: Tensor, start: int, cache: list[Tensor], mask: Tensor | None, *, head: bool
    ) -> Tensor | None:
        """Logits [batch, rows, vocabulary] of the rows from position `start` on, or None.

        Args:
            cache: [2, batch, heads, length, head_dim] of each layer; gets the rows' keys and
                values, which count only once a caller goes on behind them.
            mask: bool [rows, start + rows], which keys a row sees; None: all.
            head: whether logits are wanted; the pass that stores a finished block needs none.
        """
        config, width = self.config, self.config["head_dim"]
        x = self.tensors["model.embed_tokens.weight"][ids]
        batch, rows = ids.shape
        end = start + rows
        for i in range(config["num_hidden_layers"]):
            name = f"model.layers.{i}"
            normed = self._norm(x, f"{name}.input_layernorm.weight")
            q, k, v = (
                F.linear(normed, self.tensors[f"{name}.self_attn.{part}_proj.weight"]).view(
                    batch, rows, -1, width
                )
                for part in "qkv"
            )
            q = self._rotate(self._norm(q, f"{name}.self_attn.q_norm.weight"), start)
            k = self._rotate(self._norm(k, f"{name}.self_attn.k_norm.weight"), start)
            keys, values = cache[i][0], cache[i][1]
            keys[:, :, start:end], values[:, :, start:end] = k, v.transpose(1, 2)
            mixed = F.scaled_dot_product_attention(
                q, keys[:, :, :end], values[:, :, :end], attn_mask=mask, enable_gqa=True
            )
            mixed = mixed.transpose(1, 2).flatten(2)
            x = x + F.linear(mixed, self.tensors[f"{name}.self_attn.o_proj.weight"])
            normed = self._norm(x, f"{name}.post_attention_layernorm.weight")
            gate = F.silu(F.linear(normed, self.tensors[f"{name}.mlp.gate_proj.weight"]))
            up = F.linear(normed, self.tensors[f"{name}.mlp.up_proj.weight"])
            x = x + F.linear(gate * up, self.tensors[f"{name}.mlp.down_proj.weight"])
        if not head:
            return None
        return F.linear(self._norm(x, "model.norm.weight"), self.tensors["lm_head.weight"])

    def new_cache(self, batch: int, length: int) -> list[Tensor]:
        """Room for keys and values."""
        config = self.config
        shape = (2, batch, config["num_key_value_heads"], length, config["head_dim"])
        return [torch.zeros(shape) for _ in range(config["num_hidden_layers"])]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors[name]
        return F.rms_norm(x, weight.shape, weight, self.config["rms_norm_eps"])

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotary embedding of [batch, rows, heads, head_dim]; [batch, heads, rows, head_dim]."""
        x = x.transpose(1, 2)
        half, places = x.shape[-1] // 2, slice(start, start + x.shape[2])
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * self.cos[places] + turned * self.sin[places]


@torch.inference_mode()
def sdar(model: PlainSdar, prompts: Tensor, work: BlockWork) -> Tensor:
    """Answer a batch of prompts of equal length: int64 [batch, gen_length]."""
    size = work.block_length
    batch, given = prompts.shape
    end = -(-(given + work.gen_length) // size) * size
    tokens = torch.full((batch, end), work.mask_id)
    tokens[:, :given] = prompts
    cache = model.new_cache(batch, end)
    done = given // size * size
    if done:
        block = torch.arange(done) // size
        model.forward(tokens[:, :done], 0, cache, block[:, None] >= block, head=False)
    while done < end:
        here = slice(done, done + size)
        masked = torch.arange(done, done + size).expand(batch, -1) >= given
        while masked.any():
            logits = model.forward(tokens[:, here], done, cache, None, head=True)
            assert logits is not None
            logits[..., work.mask_id] = -torch.inf
            confidence, found = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -1.0)
            chosen = confidence > work.threshold
            chosen.scatter_(1, confidence.argmax(1, keepdim=True), value=True)
            chosen &= masked
            tokens[:, here] = torch.where(chosen, found, tokens[:, here])
            masked &= ~chosen
        done += size
        if done < end:  # makes the block final
            model.forward(tokens[:, here], done - size, cache, None, head=False)
    return tokens[:, given : given + work.gen_length]
