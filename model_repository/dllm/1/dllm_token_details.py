"""Makes the output `token_details`: log-probabilities and steps of commit, with tokens as text."""

from __future__ import annotations

import json
import math
from typing import Any

from dllm_engine import CanvasUpdate, SamplingParams
from dllm_engine.tokenizer import Tokenizer

Entry = dict[str, Any]


def asks_details(params: SamplingParams) -> bool:
    """Whether a request asks for the output."""
    return params.reveal_steps or params.logprobs is not None


def token_details(tokenizer: Tokenizer | None, update: CanvasUpdate, params: SamplingParams) -> str:
    """A JSON list with an entry for each position of the canvas, null where it is masked.

    Fields that the request does not ask for are null.
    """
    entries: list[Entry | None] = []
    steps, found = update.reveal_steps.tolist(), update.log_probs
    chosen = None if found is None else found.chosen.tolist()
    for position, token_id in enumerate(update.token_ids.tolist()):
        if steps[position] < 0:
            entries.append(None)
            continue
        entry = _token(tokenizer, token_id)
        entry["step"] = steps[position] if params.reveal_steps else None
        entry["logprob"] = entry["top_logprobs"] = None
        if found is not None and chosen is not None and not math.isnan(chosen[position]):
            entry["logprob"] = chosen[position]
            top = zip(
                found.top_tokens[position].tolist(), found.top[position].tolist(), strict=True
            )
            entry["top_logprobs"] = [
                _token(tokenizer, other) | {"logprob": logprob}
                for other, logprob in top
                if other >= 0
            ]
        entries.append(entry)
    return json.dumps(entries, separators=(",", ":"))


def _token(tokenizer: Tokenizer | None, token_id: int) -> Entry:
    """A token's id, text and bytes; a special token has its name as text, and no bytes."""
    if tokenizer is None:
        return {"token_id": token_id, "token": "", "bytes": []}
    content = tokenizer.token_bytes(token_id)
    text = content.decode(errors="replace") or tokenizer.token_name(token_id)
    return {"token_id": token_id, "token": text, "bytes": list(content)}
