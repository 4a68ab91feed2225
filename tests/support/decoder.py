"""Decides the commits of one step by the papers' definitions, position by position.

`Decoder` turns logits into commits; `reference.py` and `cached_reference.py` make the logits,
without and with a cache. It follows the engine's own documented rules too: the mask token is never
chosen, equal scores go to the leftmost position, and noise is a function of seed, step and position
(`plain_noise.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from dllm_engine import SamplingParams
from torch import Tensor

from . import plain_noise, rules

#: dInfer's credit: decay, exponent and weight.
BETA, GAMMA, ALPHA = 0.8, 0.2, 0.7


@dataclasses.dataclass(frozen=True)
class Ids:
    """Token ids with special treatment."""

    mask: int
    #: End of text.
    eos: tuple[int, ...]
    #: All tokens that end an answer.
    stop: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """A position's candidate token and its confidence."""

    token: int
    confidence: float
    entropy: float
    margin: float


def split_evenly(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` shares, the remainder to the first."""
    base, extra = divmod(total, parts)
    return [base + 1] * extra + [base] * (parts - extra)


def block_steps(gen_length: int, block_length: int, steps: int) -> list[tuple[int, int, int]]:
    """(start, end, steps) of each block, the steps spread evenly over the canvas."""
    edges = [*range(0, gen_length, block_length), gen_length]
    shares = []
    for start, end in itertools.pairwise(edges):
        shares.append((start, end, end * steps // gen_length - start * steps // gen_length))
    return shares


class Decoder:
    """One request's decisions; `params` must be resolved.

    Args:
        falls_back: whether SDAR's dynamic rule commits at least the schedule's share; else one.
    """

    def __init__(self, params: SamplingParams, ids: Ids, *, falls_back: bool = True) -> None:
        assert params.seed is not None
        self._falls_back = falls_back
        self.params, self.ids, self.seed = params, ids, params.seed
        #: Steps of the request so far, including those that Dream's schedule leaves empty.
        self.step = 0
        #: Confidence of committed positions.
        self.committed: dict[int, float] = {}
        #: How often it decided, and which time committed a position, from 1.
        self.decisions = 0
        self.reveal_steps: dict[int, int] = {}
        #: Log-softmax of the raw logits at committed positions.
        self.log_probs: dict[int, Tensor] = {}
        self._credit: dict[int, Tensor] = {}

    def blocks(self) -> list[tuple[int, int, int]]:
        """(start, end, steps) of each block of the canvas."""
        p = self.params
        assert p.block_length is not None
        assert p.steps is not None
        return block_steps(p.gen_length, p.block_length, p.steps)

    def open_block(self, num_masks: int, steps: int) -> None:
        """Begin a block with this many masks."""
        self._shares = split_evenly(num_masks, steps)
        self._times = torch.linspace(1, 1e-3, steps + 1)
        self._steps, self._place = steps, 0
        self._credit = {}

    def skip_empty_steps(self, num_masked: int) -> None:
        """Skip steps in which Dream's schedule commits nothing; the reference runs the model then
        too, without effect."""
        counts_by_time = self.params.alg not in (None, "origin")
        while counts_by_time and self._dream_count(num_masked) == 0:
            self.step += 1
            self._place += 1

    def decide(
        self, logits: Callable[[int], Tensor], block: range, masked: set[int]
    ) -> dict[int, Found]:
        """Decide the commits of this step.

        Args:
            logits: gives the logits of a position, [vocab].
            block: positions of the active block.
            masked: positions still to be decoded.
        """
        found = {p: self._candidate(logits(p), p) for p in block if p in masked}
        chosen = {p: found[p] for p in self._choose(found, block)}
        self.committed |= {p: f.confidence for p, f in chosen.items()}
        self.decisions += 1
        self.reveal_steps |= dict.fromkeys(chosen, self.decisions)
        self.log_probs |= {p: logits(p).double().log_softmax(0) for p in chosen}
        self.step += 1
        self._place += 1
        return chosen

    def _candidate(self, logits: Tensor, position: int) -> Found:
        p = self.params
        logits = logits.double().clone()
        if p.logits_eos_inf:
            logits[list(self.ids.eos)] = -torch.inf
        if p.credit:
            logits = self._fused(logits, position)
        allowed = logits.clone()
        allowed[self.ids.mask] = -torch.inf
        filters = p.top_p is not None or p.top_k is not None
        score = allowed
        if p.temperature > 0:
            allowed = filtered(allowed / p.temperature, p.top_p, p.top_k)
            score = allowed + plain_noise.gumbel(
                self._key(position, plain_noise.TOKEN), len(logits)
            )
        elif p.alg and filters:
            allowed = filtered(allowed, p.top_p, p.top_k)
        token = int(score.argmax())
        if p.alg and (p.temperature > 0 or filters):
            distribution = allowed.softmax(0)
        else:
            if p.confidence_eos_eot_inf:
                logits[list(self.ids.stop)] = -torch.inf
            distribution = logits.softmax(0)
        best = distribution.sort(descending=True).values
        return Found(
            token,
            float(distribution[token]),
            float(-torch.special.xlogy(distribution, distribution).sum()),
            float(best[0] - best[1]),
        )

    def _fused(self, logits: Tensor, position: int) -> Tensor:
        """Apply dInfer's credit: C ← βC, C[top1] += p^γ, then ℓ + α·log(1 + C)."""
        allowed = logits.clone()
        allowed[self.ids.mask] = -torch.inf
        best = int(allowed.argmax())
        credit = BETA * self._credit.get(position, torch.zeros_like(logits))
        credit[best] += logits.softmax(0)[best] ** GAMMA
        self._credit[position] = credit
        return logits + ALPHA * credit.log1p()

    def _choose(self, found: dict[int, Found], block: range) -> list[int]:
        p = self.params
        masked = [position in found for position in block]

        def column(name: str) -> list[float]:
            return [getattr(found[i], name) if i in found else 0.0 for i in block]

        confidence, entropy = column("confidence"), column("entropy")
        if p.remasking == "low_confidence_dynamic":
            assert p.confidence_threshold is not None
            count = self._shares[self._place] if self._falls_back else 1
            places = rules.dynamic(confidence, masked, p.confidence_threshold, count)
        elif p.confidence_threshold is not None and p.low_threshold is not None:
            places = rules.hierarchical(confidence, masked, p.low_threshold, p.confidence_threshold)
        elif p.confidence_threshold is not None:
            places = rules.threshold(confidence, masked, p.confidence_threshold)
        elif p.factor is not None:
            places = rules.factor(confidence, masked, p.factor)
        elif p.entropy_bound is not None:
            places = rules.entropy_bound(entropy, masked, p.entropy_bound)
        elif p.anchor_threshold is not None:
            before = [self.committed.get(i, -1.0) for i in block]
            fair = 0.75 if p.neighbor_threshold is None else p.neighbor_threshold
            count = self._shares[self._place]
            places = rules.local_leap(
                confidence,
                masked,
                before,
                count,
                p.anchor_threshold,
                fair,
                self._order(found, block),
            )
        elif p.alg == "origin":
            chance = self._dream_chance()
            places = {i for i, at in enumerate(block) if masked[i] and self._uniform(at) < chance}
        else:
            count = self._dream_count(sum(masked)) if p.alg else self._shares[self._place]
            places = rules.fixed_count(self._order(found, block), masked, count)
        return [block[i] for i in places]

    def _order(self, found: dict[int, Found], block: range) -> list[float]:
        """The score by which positions are ranked, larger first."""
        p = self.params
        kind = p.alg or p.remasking
        scores = []
        for position in block:
            if position not in found:
                scores.append(0.0)
                continue
            f = found[position]
            score = {
                "low_confidence": f.confidence,
                "maskgit_plus": f.confidence,
                "entropy": -f.entropy,
                "margin": f.margin,
                "topk_margin": f.margin,
                "sequential": -float(position),
            }.get(kind)
            scores.append(self._uniform(position) if score is None else score)
            if p.alg_temp > 0:
                noise = plain_noise.order_gumbel(self._key(position, plain_noise.ORDER))
                scores[-1] = scores[-1] / p.alg_temp + noise
        return scores

    def _dream_chance(self) -> float:
        """1 − s/t, and everything in the last step."""
        if self._place == self._steps - 1:
            return 1.0
        return float(1 - self._times[self._place + 1] / self._times[self._place])

    def _dream_count(self, num_masked: int) -> int:
        """⌊masks · (1 − s/t)⌋ in float32, as Dream's code counts; everything in the last step."""
        if self._place == self._steps - 1:
            return num_masked
        share = 1 - self._times[self._place + 1] / self._times[self._place]
        return int(torch.tensor(float(num_masked)) * share)

    def _key(self, position: int, use: int) -> int:
        return plain_noise.key(self.seed, self.step, position, use)

    def _uniform(self, position: int) -> float:
        return plain_noise.uniform(self._key(position, plain_noise.ORDER))


def filtered(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Apply top-p, then top-k to the rest: Dream's order. Dropped tokens get −∞."""
    kept = set(range(len(logits)))
    if top_p is not None:
        probability = logits.softmax(0).tolist()
        kept, total = set(), 0.0
        for token in sorted(range(len(logits)), key=lambda t: (-probability[t], t)):
            if total >= top_p:
                break
            kept.add(token)
            total += probability[token]
    if top_k is not None:
        values = logits.tolist()
        kept = set(sorted(kept, key=lambda t: (-values[t], t))[:top_k])
    dropped = torch.tensor([t not in kept for t in range(len(logits))])
    return logits.masked_fill(dropped, -torch.inf)
