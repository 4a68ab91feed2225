"""From hidden states to committed tokens: candidates at masked positions, then a rule."""

from .candidates import Candidates, RowNoise, sample_candidates
from .commit import CommitPlan, select_commits

__all__ = ["Candidates", "CommitPlan", "RowNoise", "sample_candidates", "select_commits"]
