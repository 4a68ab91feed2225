"""From hidden states to committed tokens: candidates at masked positions, then a rule."""

from .candidates import sample_candidates
from .commit import BlockStatistics, CommitPlan, select_commits
from .credit import LISTED, CreditLists, CreditRows, Credits
from .rows import Candidates, RowSampling, SamplingFlags, SpecialTokens, needs_whole_row
from .whole_rows import least_bytes

__all__ = [
    "LISTED",
    "BlockStatistics",
    "Candidates",
    "CommitPlan",
    "CreditLists",
    "CreditRows",
    "Credits",
    "RowSampling",
    "SamplingFlags",
    "SpecialTokens",
    "least_bytes",
    "needs_whole_row",
    "sample_candidates",
    "select_commits",
]
