"""Log-probabilities in OpenAI's two formats, and which tokens a text so far is made of."""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel

from adapter.types import Event, TokenDetail, TopLogprob


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token of a choice's text, and how many characters stand before it."""

    detail: TokenDetail
    offset: int


def text_tokens(event: Event) -> list[TextToken] | None:
    """The tokens that the text of an event begins in; None if the call asks for no details.

    While a request runs, a token whose end is not final yet is left out.
    """
    if event.tokens is None:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found, offset, length = [], 0, len(event.text)
    for detail in event.tokens:
        end = offset + len(decoder.decode(bytes(detail.bytes)))
        if offset >= length or (end > length and not event.finish_reason):
            break
        found.append(TextToken(detail, offset))
        offset = end
    return found


class ChatTopLogprob(BaseModel):
    """One of the most probable tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    """A token of the message, and the most probable ones at its position."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a message's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, tokens: Sequence[TextToken] | None) -> Self | None:
        """None if the call asks for none."""
        if tokens is None:
            return None
        content = []
        for token in tokens:
            detail = token.detail
            if detail.logprob is None:
                return None
            chosen = _chat(detail, detail.logprob)
            top = [_chat(other, other.logprob) for other in detail.top_logprobs or ()]
            content.append(ChatTokenLogprob(**chosen.model_dump(), top_logprobs=top))
        return cls(content=content)


def _chat(token: TokenDetail | TopLogprob, logprob: float) -> ChatTopLogprob:
    return ChatTopLogprob(token=token.token, logprob=logprob, bytes=token.bytes)


class TextLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens; each list has one item per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[Mapping[str, float]]
    text_offset: list[int]

    @classmethod
    def of(cls, tokens: Sequence[TextToken] | None) -> Self | None:
        """None if the call asks for none."""
        if tokens is None or any(token.detail.logprob is None for token in tokens):
            return None
        details = [token.detail for token in tokens]
        return cls(
            tokens=[_legacy(detail) for detail in details],
            token_logprobs=[detail.logprob or 0.0 for detail in details],
            top_logprobs=[
                {_legacy(other): other.logprob for other in detail.top_logprobs or ()}
                | {_legacy(detail): detail.logprob or 0.0}
                for detail in details
            ],
            text_offset=[token.offset for token in tokens],
        )


def _legacy(token: TokenDetail | TopLogprob) -> str:
    """A token's text; a part of a character as OpenAI writes it, so that no two are equal."""
    content = bytes(token.bytes)
    try:
        content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
    return token.token


def reveal_steps_of(tokens: Sequence[TextToken] | None) -> list[int] | None:
    """The step that committed each token; None if the call does not ask."""
    steps = [token.detail.step for token in tokens or ()]
    known = [step for step in steps if step is not None]
    return known if tokens is not None and len(known) == len(steps) else None
