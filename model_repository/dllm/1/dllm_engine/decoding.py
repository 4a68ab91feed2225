"""The table of decoding rules: request fields, meaning and source of each.

The checks of requests, the commit step, the tests and docs/decoding.md all take the rules from
here. Plain data, no torch.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping


class Score(enum.IntEnum):
    """The value by which positions of a block are ranked."""

    CONFIDENCE = 0
    RANDOM = 1
    ENTROPY = 2
    MARGIN = 3
    #: Further left is better.
    POSITION = 4


class Rule(enum.IntEnum):
    """How to decide which positions are committed."""

    COUNT = 0
    THRESHOLD = 1
    FACTOR = 2
    ENTROPY_BOUND = 3
    HIERARCHICAL = 4
    LOCAL_LEAP = 5
    ORIGIN = 6
    DYNAMIC = 7
    SPECULATIVE = 8


#: Scores that need the entropy or margin of candidates.
ENTROPY_SCORES = frozenset({Score.ENTROPY, Score.MARGIN})


#: What `remasking` is if a request sets none, and its model has no rule of its own.
DEFAULT_REMASKING = "low_confidence"


def is_given(value: object) -> bool:
    """Whether a request sets a field to this value; 0 counts as set."""
    return value is not None and value is not False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """One row of the table: a way to decide what a step commits."""

    #: The request field that selects this row, …
    field: str
    #: … with this value; None: with any number.
    value: str | None = None
    #: Another field that the request must set as well.
    also: str | None = None
    #: Field of the rule's second number, and its default.
    second: str | None = None
    second_default: float = 0.0
    rule: Rule
    #: None: the score of `remasking`, if the rule ranks positions.
    score: Score | None = None
    #: Where the definition comes from; the definition in one line.
    source: str
    definition: str

    @property
    def name(self) -> str:
        """The row as a request writes it."""
        name = self.field if self.value is None else f"{self.field}={self.value}"
        return name if self.also is None else f"{name} + {self.also}"

    def matches(self, params: object) -> bool:
        """Whether a request with these `SamplingParams` selects this row."""
        value = _remasking(params) if self.field == "remasking" else getattr(params, self.field)
        if value is None or self.value not in (None, value):
            return False
        return self.also is None or is_given(getattr(params, self.also))

    def bounds(self, params: object) -> tuple[float, float]:
        """The rule's two parameters; 0 for a parameter that it does not have."""
        name = self.field if self.value is None else self.also
        first = 0.0 if name is None else getattr(params, name)
        second = getattr(params, self.second) if self.second else None
        return first, self.second_default if second is None else second


#: The first matching row applies, so rows that need more fields come first.
DECODINGS: tuple[Decoding, ...] = (
    Decoding(
        field="remasking",
        value="low_confidence_dynamic",
        also="confidence_threshold",
        rule=Rule.DYNAMIC,
        score=Score.CONFIDENCE,
        source="SDAR, generate.py; Fast-dLLM v2",
        definition="everything above confidence_threshold if that is as many as the schedule's "
        "count (Fast-dLLM v2: one), else that many of the most confident",
    ),
    Decoding(
        field="confidence_threshold",
        also="low_threshold",
        second="low_threshold",
        rule=Rule.HIERARCHICAL,
        source="dInfer, arXiv 2510.08666",
        definition="everything above confidence_threshold, the best of each run of masks if above "
        "low_threshold, and the best of all",
    ),
    Decoding(
        field="confidence_threshold",
        also="credit",
        rule=Rule.THRESHOLD,
        source="dInfer, arXiv 2510.08666",
        definition="the threshold, on logits raised for tokens that were best in steps before",
    ),
    Decoding(
        field="confidence_threshold",
        rule=Rule.THRESHOLD,
        source="Fast-dLLM, arXiv 2505.22618",
        definition="everything at least this confident, and the best",
    ),
    Decoding(
        field="factor",
        rule=Rule.FACTOR,
        source="Fast-dLLM, arXiv 2505.22618",
        definition="the longest run of n most confident with c_n at least 1 - factor / (n + 1), "
        "and the best",
    ),
    Decoding(
        field="entropy_bound",
        rule=Rule.ENTROPY_BOUND,
        source="EB-sampler, arXiv 2505.24857",
        definition="the least uncertain, while the entropies before them sum to at most this",
    ),
    Decoding(
        field="anchor_threshold",
        second="neighbor_threshold",
        second_default=0.75,
        rule=Rule.LOCAL_LEAP,
        source="dlmserve's variant of LocalLeap, arXiv 2510.07081",
        definition="the schedule's count by remasking, and neighbours of at least "
        "neighbor_threshold within 4 positions of any that was or is committed with at least this",
    ),
    Decoding(
        field="alg",
        value="origin",
        rule=Rule.ORIGIN,
        score=Score.RANDOM,
        source="Dream, generation_utils.py",
        definition="each masked position by chance, 1 - s/t of the time schedule",
    ),
    Decoding(
        field="alg",
        value="maskgit_plus",
        rule=Rule.COUNT,
        score=Score.CONFIDENCE,
        source="Dream, generation_utils.py",
        definition="the time schedule's count of positions with the largest probability of their "
        "token",
    ),
    Decoding(
        field="alg",
        value="topk_margin",
        rule=Rule.COUNT,
        score=Score.MARGIN,
        source="Dream, generation_utils.py",
        definition="the time schedule's count of positions whose two best tokens are furthest "
        "apart",
    ),
    Decoding(
        field="alg",
        value="entropy",
        rule=Rule.COUNT,
        score=Score.ENTROPY,
        source="Dream, generation_utils.py",
        definition="the time schedule's count of positions with the least entropy",
    ),
    Decoding(
        field="remasking",
        value="low_confidence",
        rule=Rule.COUNT,
        score=Score.CONFIDENCE,
        source="LLaDA, generate.py",
        definition="the schedule's count of positions with the largest probability of their token",
    ),
    Decoding(
        field="remasking",
        value="random",
        rule=Rule.COUNT,
        score=Score.RANDOM,
        source="LLaDA, generate.py",
        definition="the schedule's count, drawn evenly",
    ),
    Decoding(
        field="remasking",
        value="entropy",
        rule=Rule.COUNT,
        score=Score.ENTROPY,
        source="this engine: Dream's score on LLaDA's schedule",
        definition="the schedule's count of positions with the least entropy -sum(p log p) of the "
        "untempered distribution",
    ),
    Decoding(
        field="remasking",
        value="margin",
        rule=Rule.COUNT,
        score=Score.MARGIN,
        source="this engine: the score of arXiv 2502.06768 and Dream's topk_margin on LLaDA's "
        "schedule",
        definition="the schedule's count of positions with the largest p1 - p2, the two best "
        "tokens' probabilities in the untempered distribution",
    ),
    Decoding(
        field="remasking",
        value="sequential",
        rule=Rule.COUNT,
        score=Score.POSITION,
        source="SDAR, generate.py",
        definition="the schedule's count of positions from the left",
    ),
    Decoding(
        field="remasking",
        value="speculative",
        rule=Rule.SPECULATIVE,
        score=Score.CONFIDENCE,
        source="Nemotron-Labs-Diffusion, arXiv 2607.05722",
        definition="Nemotron alone: of a block that one step drafts what reading left to right "
        "gives, too, as the next step finds; at temperature 0 the answer is that of left-to-right "
        "decoding",
    ),
)


def _by_value(field: str) -> Mapping[str, Decoding]:
    return {row.value: row for row in DECODINGS if row.field == field and row.value is not None}


#: Values of `remasking`: LLaDA's schedule, statistics of the clean distribution.
REMASKING = _by_value("remasking")
#: Values of `alg`: Dream's schedule, statistics of the tempered and filtered distribution.
ALG = _by_value("alg")
#: Fields that each choose how many positions a step commits; a request may set at most one.
COMMIT_FIELDS = tuple(dict.fromkeys(row.field for row in DECODINGS if row.value is None))
#: Fields that require another field: that field.
REQUIRED_WITH: Mapping[str, str] = {
    name: row.field
    for row in DECODINGS
    if row.value is None and (name := row.also or row.second) is not None
}


def _remasking(params: object) -> str:
    given: str | None = getattr(params, "remasking")  # noqa: B009
    return given or DEFAULT_REMASKING


def decoding_of(params: object) -> Decoding:
    """The row that a request with these `SamplingParams` selects."""
    return next(row for row in DECODINGS if row.matches(params))


def score_of(params: object) -> Score:
    """The score of a request with these `SamplingParams`; some parallel rules ignore it."""
    score = decoding_of(params).score
    found = REMASKING[_remasking(params)].score if score is None else score
    assert found is not None
    return found
