"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import TILE
from dllm_engine.ops.log_probs import LOG_PROB_BYTES, TokenLogits
from dllm_engine.ops.rows import ROW_MULTIPLE

#: Rows of a chunk on a GPU, where sums depend on how many rows are computed together.
_GPU_ROWS = 64


@dataclasses.dataclass(frozen=True)
class TokenLogProbs:
    """Log-softmax of each row's logits, at one token and at the most probable ones; float32."""

    #: [rows].
    chosen: Tensor
    #: [rows, K], descending, and the int64 tokens; never the mask token.
    top: Tensor
    top_tokens: Tensor


def token_log_probs(
    hidden: Tensor, head: Head, tokens: Tensor, *, mask: int, num_top: int, budget_bytes: int
) -> TokenLogProbs:
    """Compute the log-softmax of the head's logits: no temperature, no filter, nothing forbidden.

    The sum is over the whole vocabulary, with the mask token. A row's values do not depend on the
    other rows.

    Args:
        hidden: [rows, hidden_size], after the final norm.
        head: the language-model head.
        tokens: [rows] int64; the token of each row.
        mask: the mask token.
        num_top: how many of the most probable tokens to list, K.
        budget_bytes: memory for logits; at least `ROW_MULTIPLE` rows are computed at once.
    """
    num_top = min(num_top, head.vocab_size - 1)
    chunk = budget_bytes // (min(TILE, head.vocab_size) * LOG_PROB_BYTES)
    chunk = max(ROW_MULTIPLE, chunk // ROW_MULTIPLE * ROW_MULTIPLE)
    multiple = ROW_MULTIPLE
    if hidden.device.type != "cpu":
        chunk = multiple = min(chunk, _GPU_ROWS)
    missing = -len(hidden) % multiple
    hidden, tokens = F.pad(hidden, (0, 0, 0, missing)), F.pad(tokens, (0, missing))
    parts = [
        head.token_logits(hidden[i : i + chunk], tokens[i : i + chunk], mask=mask, num_top=num_top)
        for i in range(0, len(hidden), chunk)
    ]
    found = TokenLogits.joined(parts).take(slice(len(hidden) - missing))
    normalizer = found.normalizer
    return TokenLogProbs(
        (found.chosen - normalizer).float(),
        (found.top - normalizer.unsqueeze(1)).float(),
        found.top_tokens,
    )
