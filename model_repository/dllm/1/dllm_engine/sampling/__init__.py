"""Chooses tokens: candidates at the masked positions, then the ones that a rule commits."""

from dllm_engine.sampling.candidates import sample_candidates
from dllm_engine.sampling.commit import BlockStatistics, CommitPlan, select_commits
from dllm_engine.sampling.credit import LISTED, CreditLists, CreditRows, Credits
from dllm_engine.sampling.full_logits import least_bytes
from dllm_engine.sampling.rows import (
    Candidates,
    RowSampling,
    SamplingFlags,
    SpecialTokens,
    needs_full_logits,
)

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
    "needs_full_logits",
    "sample_candidates",
    "select_commits",
]
