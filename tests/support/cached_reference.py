"""Decodes with a key/value cache by the policies' definitions, slowly and plainly.

One request at a time, one attention head at a time; the store is a dictionary from position to key
and value, per layer and KV head. Definitions: Fast-dLLM (prefix and dual cache),
Sparse-dLLM and dLLM-Serve (head-centric selection), dKV-Cache (storing one step after the commit).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from dllm_engine import Prompt, SamplingParams
from torch import Tensor

from .decoder import Decoder, Ids
from .oracle import checkpoint_config, checkpoint_tensors
from .reference import Canvas, ReferenceResult

#: Positions outside the window that a KV head keeps at any ratio.
LEAST_KEPT = 32

#: Store of one layer and KV head: position to (key, value).
Stored = dict[int, tuple[Tensor, Tensor]]
#: From tokens, positions and the store to hidden states and fresh keys and values.
Rows = dict[int, Tensor]


@dataclasses.dataclass(frozen=True)
class CacheRules:
    """One request's caching parameters."""

    policy: str
    delay_steps: int = 0
    refresh_interval: int = 0
    retention_ratio: float = 0.5
    pool_kernel: int = 3

    @classmethod
    def of(cls, params: SamplingParams) -> CacheRules:
        """The rules of a request; unset fields get their default."""
        given = {f.name: getattr(params, f.name, None) for f in dataclasses.fields(cls)[1:]}
        given = {name: value for name, value in given.items() if value is not None}
        return cls(params.cache or "none", **given)


class PlainModel:
    """A LLaDA or Dream checkpoint computed position by position."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.tensors = {k: v.to(dtype) for k, v in checkpoint_tensors(directory).items()}
        config = checkpoint_config(directory)
        self.shifted = config.shifted
        self.num_layers = config.num_layers
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.eps, self.theta = config.rms_norm_eps, config.rope_theta

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm of one vector."""
        return self.tensors[name] * x / (x.pow(2).mean() + self.eps).sqrt()

    def project(self, x: Tensor, name: str) -> Tensor:
        """A linear map of one vector, with its bias if it has one."""
        out = self.tensors[f"{name}.weight"] @ x
        return out + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else out

    def rotate(self, head: Tensor, position: int) -> Tensor:
        """Rotary embedding of one head, angles in float32 as in transformers' classes."""
        half = self.head_dim // 2
        frequencies = 1.0 / self.theta ** (torch.arange(half).float() * 2 / self.head_dim)
        angles = (position * frequencies).repeat(2)
        turned = torch.cat([-head[half:], head[:half]])
        return head * angles.cos().to(head.dtype) + turned * angles.sin().to(head.dtype)

    def forward(
        self, tokens: dict[int, int], stored: list[list[Stored]]
    ) -> tuple[Callable[[int], Tensor], list[Rows], list[list[Stored]]]:
        """Hidden states by position, queries per layer, and fresh keys and values.

        A position attends to all given positions and to every stored one that is not given.
        """
        x = {p: self.tensors["model.embed_tokens.weight"][t] for p, t in tokens.items()}
        queries: list[Rows] = []
        fresh: list[list[Stored]] = []
        for i in range(self.num_layers):
            name = f"model.layers.{i}"
            normed = {p: self.norm(h, f"{name}.input_layernorm.weight") for p, h in x.items()}
            q, k, v = (
                {
                    p: self.project(h, f"{name}.self_attn.{kind}_proj").view(-1, self.head_dim)
                    for p, h in normed.items()
                }
                for kind in "qkv"
            )
            q = {p: torch.stack([self.rotate(h, p) for h in heads]) for p, heads in q.items()}
            k = {p: torch.stack([self.rotate(h, p) for h in heads]) for p, heads in k.items()}
            queries.append(q)
            fresh.append([{p: (k[p][g], v[p][g]) for p in x} for g in range(self.num_kv_heads)])
            seen = [old | new for old, new in zip(stored[i], fresh[i], strict=True)]
            for p, h in x.items():
                mixed = torch.cat([self.attend(q[p], j, seen) for j in range(self.num_heads)])
                h = h + self.project(mixed, f"{name}.self_attn.o_proj")
                inner = self.norm(h, f"{name}.post_attention_layernorm.weight")
                gate = self.project(inner, f"{name}.mlp.gate_proj")
                up = self.project(inner, f"{name}.mlp.up_proj")
                swish = gate * torch.sigmoid(gate)
                x[p] = h + self.project(swish * up, f"{name}.mlp.down_proj")

        def logits(position: int) -> Tensor:
            return self.tensors["lm_head.weight"] @ self.norm(x[position], "model.norm.weight")

        return logits, queries, fresh

    def attend(self, query: Tensor, head: int, seen: list[Stored]) -> Tensor:
        """Attention of one head at one position over all visible keys."""
        pairs = list(seen[head * self.num_kv_heads // self.num_heads].values())
        keys = torch.stack([key for key, _ in pairs])
        values = torch.stack([value for _, value in pairs])
        weights = (keys @ query[head] / self.head_dim**0.5).softmax(0)
        return weights @ values

    def nothing(self) -> list[list[Stored]]:
        """An empty store."""
        return [[{} for _ in range(self.num_kv_heads)] for _ in range(self.num_layers)]

    def select(
        self, queries: list[Rows], fresh: list[list[Stored]], block: range, window: range,
        rules: CacheRules,
    ) -> list[list[Stored]]:  # fmt: skip
        """Select the positions outside the window that each KV head of each layer keeps."""
        kept = self.nothing()
        group = self.num_heads // self.num_kv_heads
        for layer in range(self.num_layers):
            for head in range(self.num_kv_heads):
                outside = [p for p in fresh[layer][head] if p not in window]
                if not outside:
                    continue
                scores = []
                for p in outside:
                    shared = range(head * group, (head + 1) * group)
                    key = fresh[layer][head][p][0] / self.head_dim**0.5
                    sums = [sum((queries[layer][b][j] @ key).exp() for b in block) for j in shared]
                    scores.append(max(float(torch.as_tensor(total).log()) for total in sums))
                reach = rules.pool_kernel // 2
                pooled = [
                    max(scores[max(0, i - reach) : i + reach + 1]) for i in range(len(scores))
                ]
                count = max(LEAST_KEPT, int(rules.retention_ratio * len(outside)))
                best = sorted(range(len(outside)), key=lambda i: (-pooled[i], i))[:count]
                kept[layer][head] = {outside[i]: fresh[layer][head][outside[i]] for i in best}
        return kept


class _Sequence:
    """One sequence's store and its steps; guidance has two sequences."""

    def __init__(self, model: PlainModel, rules: CacheRules) -> None:
        self.model, self.rules = model, rules
        self.stored = model.nothing()

    def logits(
        self, x: list[int], masked: set[int], recent: set[int], block: range, age: int
    ) -> Callable[[int], Tensor]:
        """Logits for a position of the block, after one step."""
        model, rules = self.model, self.rules
        window = range(max(0, block.start - model.shifted), block.stop)
        since = age - rules.delay_steps
        again = rules.refresh_interval > 0 and since % rules.refresh_interval == 0
        if rules.policy == "none" or since <= 0 or again:
            everything = dict(enumerate(x))
            logits, queries, fresh = model.forward(everything, model.nothing())
            if rules.policy != "none" and since >= 0:
                selects = rules.policy == "sparse"
                self.stored = (
                    model.select(queries, fresh, block, window, rules) if selects else fresh
                )
        else:
            active = {
                "prefix": range(window.start, len(x)),
                "dual": window,
                "sparse": window,
                "delayed": [
                    p
                    for p in window
                    if p in masked or p in recent or (model.shifted and p + 1 in masked)
                ],
            }[rules.policy]
            logits, _, fresh = model.forward({p: x[p] for p in active}, self.stored)
            self.stored = [
                [old | new for old, new in zip(olds, news, strict=True)]
                for olds, news in zip(self.stored, fresh, strict=True)
            ]
        return lambda p: logits(max(0, p - model.shifted))


def generate_cached(
    model: PlainModel, prompt: Prompt, params: SamplingParams, ids: Ids
) -> ReferenceResult:
    """Decode one request by any rule and cache policy; `params` must be resolved."""
    canvas, decoder = Canvas(prompt, params, ids), Decoder(params, ids)
    cache = CacheRules.of(params)
    sequence, blind = _Sequence(model, cache), _Sequence(model, cache)
    guidance = params.cfg_scale
    passes = 0
    for start, end, steps in decoder.blocks():
        block = range(canvas.first + start, canvas.first + end)
        decoder.open_block(len(canvas.masked & set(block)), steps)
        recent: set[int] = set()
        age = 0
        while left := len(canvas.masked & set(block)):
            decoder.skip_empty_steps(left)
            outcome = sequence.logits(canvas.tokens, canvas.masked, recent, block, age)
            passes += 1
            if guidance:
                conditional = outcome
                without = blind.logits(canvas.blind(), canvas.masked, recent, block, age)
                passes += 1

                def outcome(
                    p: int,
                    conditional: Callable[[int], Tensor] = conditional,
                    without: Callable[[int], Tensor] = without,
                ) -> Tensor:
                    return without(p) + (guidance + 1) * (conditional(p) - without(p))

            commits = decoder.decide(outcome, block, canvas.masked)
            for position, found in commits.items():
                canvas.tokens[position] = found.token
            recent = set(commits)
            canvas.masked -= recent
            age += 1
            if canvas.ended:
                return canvas.result(decoder, passes)
    return canvas.result(decoder, passes)
