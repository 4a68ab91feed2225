"""What the host knows of each running request: enough to plan a step without a device wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .decoding import SPREAD_SCORES, Rule, Score, decoding_of, score_of
from .request import Prompt, SamplingParams
from .sampling import SamplingFlags, needs_whole_row


@dataclasses.dataclass
class SlotFacts:
    """One request: what it asked for, and how large its next step is."""

    rule: Rule
    score: Score
    #: The rule's two parameters.
    bounds: tuple[float, float]
    #: Positions are drawn at random by their scores.
    draws: bool
    #: Its rule looks at entropies or margins.
    needs_spread: bool
    uses_credit: bool
    sampling: SamplingFlags
    #: It samples as Dream does.
    tempered: bool
    #: Some of its schedule's steps commit nothing.
    skips: bool
    guided: bool
    sparse: bool
    length: int
    #: The positions to be filled.
    canvas: slice
    block_length: int
    #: Of its next step: rows of one sequence, masked positions of the active block, and whether
    #: it is a Refresh.
    rows: int
    masked: int
    refresh: bool = True

    @classmethod
    def of(cls, prompt: Prompt, params: SamplingParams, mask: int) -> SlotFacts:
        """Of a request that has just been laid out; `params` must be resolved."""
        assert params.block_length is not None
        decoding, score = decoding_of(params), score_of(params)
        rule = decoding.rule
        length = prompt.num_tokens + params.gen_length
        return cls(
            rule=rule,
            score=score,
            bounds=decoding.bounds(params),
            draws=params.alg_temp > 0,
            needs_spread=score in SPREAD_SCORES or rule is Rule.ENTROPY_BOUND,
            uses_credit=params.credit,
            sampling=_flags_of(params),
            tempered=params.alg is not None,
            skips=params.alg is not None and rule is Rule.COUNT,
            guided=params.cfg_scale > 0,
            sparse=params.cache == "sparse",
            length=length,
            canvas=slice(len(prompt.ids), len(prompt.ids) + params.gen_length),
            block_length=params.block_length,
            rows=length,
            masked=_first_masks(prompt.canvas_ids, params, mask),
        )

    @property
    def sequences(self) -> int:
        """Sequences per step: guidance needs an unconditional twin."""
        return 2 if self.guided else 1


def _first_masks(canvas: Sequence[int] | None, params: SamplingParams, mask: int) -> int:
    """Masks in the first block that has any."""
    assert params.block_length is not None
    if not canvas:
        return min(params.block_length, params.gen_length)
    starts = range(0, len(canvas), params.block_length)
    counts = (list(canvas[start : start + params.block_length]).count(mask) for start in starts)
    return next(filter(None, counts), 0)


def _flags_of(params: SamplingParams) -> SamplingFlags:
    noisy = params.temperature > 0
    top_p, top_k = params.top_p is not None and params.top_p < 1, params.top_k or 0
    return SamplingFlags(
        noisy=noisy,
        whole=needs_whole_row(noisy, top_p or top_k > 0, params.alg is not None),
        top_p=top_p,
        top_k=top_k,
        no_eos=params.logits_eos_inf,
        late_eos=params.confidence_eos_eot_inf,
    )
