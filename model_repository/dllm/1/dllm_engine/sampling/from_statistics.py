"""Candidates of rows without filters, from statistics of their logits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dllm_engine.ops import noise
from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import HeadOptions, HeadStatistics, inverse_of
from dllm_engine.ops.rows import ROW_MULTIPLE
from dllm_engine.sampling.credit import Credits, decide
from dllm_engine.sampling.rows import Candidates, RowSampling, SpecialTokens


def from_statistics(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    budget_bytes: int,
    needs_entropy: bool,
    credits: Credits | None = None,
    read_tokens: Tensor | None = None,
) -> Candidates:
    """Candidates from the clean distribution; see `sample_candidates`.

    The budget limits how many rows are reduced at once.
    """
    row_bytes = head.statistics_bytes(noisy=rows.flags.noisy, needs_entropy=needs_entropy)
    chunk = max(ROW_MULTIPLE, budget_bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    slices = [slice(i, i + chunk) for i in range(0, max(1, len(hidden)), chunk)]
    options = options_of(rows, special, needs_entropy, hidden.dtype)
    parts = [
        _candidates(
            hidden[part],
            head,
            options.take(part),
            None if credits is None else credits.take(part),
            None if read_tokens is None else read_tokens[part],
        )
        for part in slices
    ]
    return Candidates.joined(parts)


def options_of(
    rows: RowSampling, special: SpecialTokens, needs_entropy: bool, dtype: torch.dtype
) -> HeadOptions:
    """What the head must know of some rows; `dtype` is that of their hidden states."""
    flags, keys, inverse = rows.flags, None, None
    if flags.noisy:
        keys = noise.row_keys(rows.seed, rows.step, rows.position, noise.STREAM_TOKEN)
        inverse = inverse_of(rows.temperature, torch.promote_types(dtype, torch.float32))
    uncounted = rows.confidence_eos_eot_inf if flags.confidence_eos_eot_inf else None
    return HeadOptions(
        mask=special.mask,
        eos=special.eos,
        stop=special.stop,
        logits_eos_inf=rows.logits_eos_inf if flags.logits_eos_inf else None,
        confidence_eos_eot_inf=uncounted,
        inverse_temperature=inverse,
        keys=keys,
        needs_entropy=needs_entropy,
    )


def _candidates(
    hidden: Tensor,
    head: Head,
    options: HeadOptions,
    credits: Credits | None,
    read_tokens: Tensor | None,
) -> Candidates:
    extra = [] if credits is None else [credits.tokens]
    listed = extra[0].shape[1] if extra else 0
    if read_tokens is not None:
        extra.append(read_tokens)
    found = head.statistics(hidden, options, torch.cat(extra, dim=1) if extra else None)
    read = None
    if read_tokens is not None and found.extra_logits is not None:
        below = found.extra_logits[:, listed:] - found.max_logit.unsqueeze(1)
        read = below - found.sum_exp.log().unsqueeze(1)
    if found.extra_logits is not None:
        found.extra_logits = found.extra_logits[:, :listed]
    return dataclasses.replace(candidates_of(found, options, credits), read=read)


def candidates_of(
    found: HeadStatistics, options: HeadOptions, credits: Credits | None = None
) -> Candidates:
    """Confidence, entropy and margin from the statistics of some rows."""
    token, logit = found.token, found.logit
    if options.confidence_eos_eot_inf is not None:
        is_stop = options.confidence_eos_eot_inf & torch.isin(token, options.stop)
        logit = logit.masked_fill(is_stop, -torch.inf)
    confidence = (logit - found.max_logit).exp() / found.sum_exp
    after = None
    if credits is not None and found.extra_logits is not None:
        fused, sure, after = decide(
            credits, found.extra_logits, token, logit, found.max_logit, found.sum_exp
        )
        token = torch.where(credits.used, fused, token)
        confidence = torch.where(credits.used, sure, confidence)
    if not options.needs_entropy:
        nothing = torch.zeros_like(confidence)
        return Candidates(token, confidence, nothing, nothing, after)
    entropy = found.sum_exp.log() - found.sum_exp_logit / found.sum_exp
    margin = (1 - (found.second - found.max_logit).exp()) / found.sum_exp
    return Candidates(token, confidence, entropy, margin, after)
