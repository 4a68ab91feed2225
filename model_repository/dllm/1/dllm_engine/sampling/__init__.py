"""From hidden states to committed tokens: candidates at masked positions, then a rule."""

from .candidates import sample_candidates
from .commit import BlockStatistics, CommitPlan, select_commits
from .credit import LISTED, Credits
from .rows import Candidates, RowSampling, SpecialTokens

__all__ = [
    "LISTED",
    "BlockStatistics",
    "Candidates",
    "CommitPlan",
    "Credits",
    "RowSampling",
    "SpecialTokens",
    "sample_candidates",
    "select_commits",
]
