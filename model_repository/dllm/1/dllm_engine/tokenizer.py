"""Encodes prompts and decodes answers with the checkpoint's tokenizer and chat template."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from dllm_engine.errors import CheckpointError, InvalidRequest
from dllm_engine.messages import Message, in_plain_words, parse_messages, parse_tools, protect_chat
from dllm_engine.structured.vocabulary import Vocabulary

#: The file that identifies a tokenizer's format, and the class that reads it without the
#: checkpoint's own code. Dream has Qwen2's files, but names a class of its own.
_FORMATS = {"tokenizer.json": PreTrainedTokenizerFast, "vocab.json": Qwen2Tokenizer}
#: Placeholder for the n-th piece of user text that must not become a special token.
_SENTINEL = "\ue000{}\ue001"
_SENTINEL_PATTERN = re.compile("\ue000(\\d+)\ue001")
#: Either of its marks: where a caller's text brings one, that is such a piece too.
_MARKS = "[\ue000\ue001]+"
#: What a template may raise over messages that it does not expect; it sees nothing else.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
#: What a template that renders tools mentions.
_KNOWS_TOOLS = re.compile(r"\btools\b")
_INCOMPLETE = "\ufffd"
#: A token of a single byte, as SentencePiece names it.
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
#: The character by which a byte-level vocabulary names each byte (GPT-2's `bytes_to_unicode`).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_MAX_CHARACTER_TOKENS = 4  # one for each byte that UTF-8 may take


class Tokenizer:
    """Encodes prompts and decodes canvases.

    In messages and tools, no text of the caller becomes a special token: neither contents and
    roles, nor names, descriptions, arguments and results. In a raw prompt and a suffix
    only the mask token is taken literally, since hand-written templates need the others.
    Thread-safe.

    Args:
        tokenizer: transformers' tokenizer.
        mask_token_id: the mask token.
        max_tokens: texts that certainly have more are refused before they cost anything.
    """

    def __init__(self, tokenizer: Any, mask_token_id: int, max_tokens: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens or sys.maxsize
        self._pieces: dict[int, str] = {}  # of every token shown so far
        # Encoding switches special tokens on and off on the tokenizer itself.
        self._lock = threading.Lock()
        specials = sorted(set(tokenizer.get_added_vocab()), key=len, reverse=True)
        self._special_pattern = _protecting(specials)
        self._mask_pattern = _protecting([tokenizer.convert_ids_to_tokens(mask_token_id)])
        self._max_characters = self._max_tokens * max(map(len, tokenizer.get_vocab()))

    @classmethod
    def load(
        cls, directory: Path, mask_token_id: int, max_tokens: int | None = None
    ) -> Tokenizer | None:
        """Load the tokenizer of a checkpoint directory; None if it has none.

        `max_tokens` as for the class.

        Raises:
            CheckpointError: the tokenizer cannot be read, or lacks the mask token.
        """
        reader = next((r for file, r in _FORMATS.items() if (directory / file).exists()), None)
        if reader is None:
            return None
        try:
            tokenizer = reader.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{directory}: tokenizer: {error}") from error
        if tokenizer.convert_ids_to_tokens(mask_token_id) is None:
            problem = f"has no token {mask_token_id}, the mask token in config.json"
            raise CheckpointError(f"{directory}: tokenizer: {problem}")
        name = tokenizer.convert_ids_to_tokens(mask_token_id)
        plain = tokenizer.encode(name, add_special_tokens=False, split_special_tokens=True)
        if mask_token_id in plain:
            problem = f"the mask token {mask_token_id} is ordinary text, {name!r}"
            raise CheckpointError(f"{directory}: tokenizer: {problem}")
        return cls(tokenizer, mask_token_id, max_tokens)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """End-of-text and end-of-turn tokens of the tokenizer.

        DiffuCoder-Instruct fills the canvas behind its answer with `<|dlm_pad|>`.
        """
        vocabulary = self._tokenizer.get_added_vocab()
        names = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<|dlm_pad|>")
        return tuple(vocabulary[name] for name in names if name in vocabulary)

    @property
    def start_token_id(self) -> int | None:
        """The token that a text begins with; None if the checkpoint names none."""
        start: int | None = self._tokenizer.bos_token_id
        return start

    def vocabulary(self, ends: tuple[int, ...]) -> Vocabulary | None:
        """What each token writes; None if the tokens cannot be read as bytes.

        Args:
            ends: tokens that end an answer.
        """

        def encode(text: str) -> list[int]:
            with self._lock:
                ids: list[int] = self._tokenizer.encode(
                    text, add_special_tokens=False, split_special_tokens=False
                )
            return ids

        return Vocabulary.of(self._tokenizer, ends, encode)

    def encode_text(self, text: str) -> list[int]:
        """Encode a raw prompt without a template.

        Raises:
            InvalidRequest: the text is empty or not encodable.
        """
        if not text:
            raise InvalidRequest("text_input", "must not be empty")
        return self._encode_raw("text_input", text)

    def encode_suffix(self, text: str) -> list[int]:
        """Encode the text behind a gap; special tokens are recognised as in a raw prompt.

        Raises:
            InvalidRequest: the text is not encodable.
        """
        return self._encode_raw("suffix", text)

    def encode_chat(self, text: str) -> list[int]:
        """Encode one user message; see `encode_messages`."""
        return self.encode_messages(json.dumps([{"role": "user", "content": text}]))

    def encode_messages(self, messages_json: str, tools_json: str | None = None) -> list[int]:
        """Encode chat messages with the chat template, and the tools that the model may call.

        A template that knows no tools gets them, calls and results as text (`in_plain_words`).
        A checkpoint without a template takes a single message, as raw text.

        Args:
            messages_json: a JSON list of messages, as `parse_messages` reads them.
            tools_json: a JSON list of tools, as `parse_tools` reads them; None: no tools.

        Raises:
            InvalidRequest: this is not such a list, the template raises an error, or it makes no
                token and there is no start token.
        """
        if tools_json is not None and len(tools_json) > self._max_characters:
            raise self._too_long("tools")
        messages = parse_messages(messages_json)
        tools = [] if tools_json is None else parse_tools(tools_json)
        if len(messages) > self._max_tokens:
            raise self._too_long("messages")
        literals: list[str] = []

        def protected(text: str) -> str:
            return _protect(text, self._special_pattern, literals)

        rendered = self._render(*protect_chat(messages, tools, protected))
        ids = self._encode("messages", rendered, literals)
        if not ids and self.start_token_id is None:
            problem = "must not be empty together: the checkpoint names no start token"
            raise InvalidRequest("messages", problem)
        return ids

    def _render(self, messages: list[Message], tools: list[Any]) -> str:
        if self._tokenizer.chat_template is None:
            if tools:
                raise InvalidRequest("tools", "this checkpoint has no chat template")
            if len(messages) > 1:
                problem = "this checkpoint has no chat template; send one message, or text_input"
                raise InvalidRequest("messages", problem)
            content: str = messages[0]["content"]
            return content
        try:
            template = self._tokenizer.get_chat_template(tools=tools or None)
            if not _KNOWS_TOOLS.search(template):
                messages, tools = in_plain_words(messages, tools), []
            rendered: str = self._tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=True
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest("messages", f"chat template: {error}") from error
        return rendered

    def decode(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> str:
        """Decode tokens, without special tokens and without an incomplete character at the end."""
        return self._decode(token_ids).rstrip(_INCOMPLETE)

    def answer(self, ready_ids: npt.NDArray[np.int32], stop: tuple[str, ...]) -> str:
        """The text of a finished answer: decoded, and cut before the first stop string."""
        text = self.decode(ready_ids)
        cut = find_stop(text, stop)
        return text if cut is None else text[:cut]

    def prefix(self, ready_ids: npt.NDArray[np.int32], stop: tuple[str, ...]) -> str:
        """The text that an unfinished answer is certain to begin with.

        It excludes an end that may become a stop string, and an incomplete character.
        """
        text = self.answer(ready_ids, stop)
        return text[: len(text) - _pending_stop(text, stop)]

    def pieces(self, token_ids: npt.NDArray[np.int32], shown: npt.NDArray[np.bool_]) -> list[str]:
        """The text that each shown position adds; "" for hidden positions and special tokens.

        A character that spans several tokens belongs to the last of them, once all are shown. An
        incomplete character is never shown, nor is U+FFFD, which decoders write in its place.
        """
        pieces: list[str] = []
        partial: list[int] = []  # the latest tokens that each hold part of a character
        for token_id, is_shown in zip(token_ids.tolist(), shown.tolist(), strict=True):
            piece = self._piece(token_id) if is_shown else ""
            pieces.append(piece.replace(_INCOMPLETE, ""))
            if _INCOMPLETE not in piece:
                partial = []
                continue
            partial = [*partial, token_id][-_MAX_CHARACTER_TOKENS:]
            for start in range(len(partial) - 1):
                joined = self._decode(partial[start:])
                gained = self._gained(partial[start:], joined.strip(_INCOMPLETE))
                if gained:
                    count = len(partial) - start
                    pieces[1 - count :] = [*[""] * (count - 2), gained]
                    partial = [token_id] if joined.endswith(_INCOMPLETE) else []
                    break
        return pieces

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; none for special tokens."""
        piece = self._piece(token_id)
        if _INCOMPLETE not in piece:
            return piece.encode()
        name = self.token_name(token_id)
        if (literal := _BYTE_TOKEN.fullmatch(name)) is not None:
            return bytes([int(literal[1], 16)])
        if all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return piece.encode()

    def token_name(self, token_id: int) -> str:
        """What the vocabulary calls a token; "" for an id that it does not have."""
        return self._tokenizer.convert_ids_to_tokens(token_id) or ""

    def _gained(self, token_ids: list[int], joined: str) -> str:
        """Characters that these tokens form together, but none of them alone; "" if there are none.

        `joined` is the text of all of them.
        """
        alone = [self._piece(token_id).replace(_INCOMPLETE, "") for token_id in token_ids]
        if not joined.startswith(alone[0]):
            alone[0] = alone[0].lstrip()  # the decoder drops a leading space
        is_whole = joined.startswith(alone[0]) and _INCOMPLETE not in joined
        is_more = len(joined) > sum(map(len, alone))
        return joined[len(alone[0]) :] if is_whole and is_more else ""

    def _piece(self, token_id: int) -> str:
        """The text that one token adds; some decoders drop a text's leading space."""
        piece = self._pieces.get(token_id)
        if piece is None:
            alone = self._decode([token_id])
            piece = self._decode([token_id, token_id])[len(alone) :]
            self._pieces[token_id] = piece
        return piece

    def _decode(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> str:
        text: str = self._tokenizer.decode(
            np.asarray(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _encode_raw(self, field: str, text: str) -> list[int]:
        literals: list[str] = []
        return self._encode(field, _protect(text, self._mask_pattern, literals), literals)

    def _encode(self, field: str, text: str, literals: list[str]) -> list[int]:
        if len(text) + sum(map(len, literals)) > self._max_characters:
            raise self._too_long(field)
        ids: list[int] = []
        try:
            for i, piece in enumerate(_SENTINEL_PATTERN.split(text)):
                is_literal = i % 2 == 1
                source = literals[int(piece)] if is_literal else piece
                if source:
                    with self._lock:
                        ids += self._tokenizer.encode(
                            source, add_special_tokens=False, split_special_tokens=is_literal
                        )
                # Each literal costs a call: a text of a million of them would block everybody.
                if is_literal and len(ids) > self._max_tokens:
                    raise self._too_long(field)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest(field, f"not encodable as UTF-8: {error}") from error
        return ids

    def _too_long(self, field: str) -> InvalidRequest:
        return InvalidRequest(field, f"has more than the {self._max_tokens} tokens that may be")


def find_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Index of the first stop string in `text`, or None."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return min(found, default=None)


def _pending_stop(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = min(len(text), max((len(s) for s in stop), default=1) - 1)
    ends = (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop))
    return next(ends, 0)


def _protecting(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches these tokens, and what sentinels are made of."""
    return re.compile("|".join([_MARKS, *map(re.escape, tokens)]))


def _protect(text: str, pattern: re.Pattern[str], literals: list[str]) -> str:
    """Replace what `pattern` matches by sentinels; adds the originals to `literals`."""

    def replace(match: re.Match[str]) -> str:
        literals.append(match.group())
        return _SENTINEL.format(len(literals) - 1)

    return pattern.sub(replace, text)
