"""The bytes that each token of a checkpoint's vocabulary writes."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "\u2581"
#: Tokens that are decoded to compare what the tokenizer writes with what we think.
_CHECKED = 4096


@dataclasses.dataclass(frozen=True)
class Trie:
    """All beginnings of all tokens, level by level: node 0 is empty."""

    #: Of each level the parents and last bytes of its nodes, which are numbered on.
    levels: list[tuple[Array, Array]]
    #: The tokens, and the node of each.
    tokens: Array
    nodes: Array
    num_nodes: int


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a checkpoint write.

    Args:
        texts: bytes by token, without tokens that write nothing, and special ones.
        ends: tokens that end an answer; the first is the one to write.
        strips_space: the decoder drops a leading space.
        encode: tokens of a text, as the checkpoint was trained with.
    """

    texts: Mapping[int, bytes]
    ends: tuple[int, ...]
    strips_space: bool
    encode: Callable[[str], list[int]]

    @functools.cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.texts.values()))

    @functools.cached_property
    def trie(self) -> Trie:
        """All beginnings of all tokens."""
        number: dict[bytes, int] = {b"": 0}
        levels: list[tuple[list[int], list[int]]] = []
        tokens, nodes = [], []
        for length in range(1, self.longest + 1):
            parents: list[int] = []
            last: list[int] = []
            for text in self.texts.values():
                if len(text) >= length and text[:length] not in number:
                    parents.append(number[text[: length - 1]])
                    last.append(text[length - 1])
                    number[text[:length]] = len(number)
            levels.append((parents, last))
        for token, text in self.texts.items():
            tokens.append(token)
            nodes.append(number[text])
        return Trie(
            [(np.array(p, np.int64), np.array(b, np.int64)) for p, b in levels],
            np.array(tokens, np.int64),
            np.array(nodes, np.int64),
            len(number),
        )

    def canonical(self, text: bytes) -> list[int]:
        """The tokens of a text that stands inside an answer; [] if the tokenizer changes it."""
        try:
            plain = text.decode()
        except UnicodeDecodeError:
            return []
        # Behind a line break, no tokenizer puts a space before a word.
        for before in ("", "\n"):
            tokens = self.encode(before + plain)
            while tokens and b"".join(self.texts.get(t, b"") for t in tokens) != text:
                del tokens[0]
            if tokens and all(token in self.texts for token in tokens):
                return tokens
        return []

    @classmethod
    def of(
        cls, tokenizer: Any, ends: tuple[int, ...], encode: Callable[[str], list[int]]
    ) -> Vocabulary | None:
        """Read transformers' tokenizer; None if its tokens cannot be read as bytes.

        Known are vocabularies of bytes (GPT-2's, Qwen's, LLaDA's) and of SentencePiece (Llama's).
        """
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        decoders = _decoders(backend["decoder"])
        added = {token["id"]: token for token in backend["added_tokens"]}
        special = {*tokenizer.all_special_ids, *(i for i, t in added.items() if t["special"])}
        if "ByteLevel" in decoders:
            read, strips = _byte_level, False
        elif "ByteFallback" in decoders or "Metaspace" in decoders:
            read, strips = _sentence_piece, True
        else:
            return None
        texts = {}
        for name, token in tokenizer.get_vocab().items():
            text = added[token]["content"].encode() if token in added else read(name)
            if text and token not in special and token not in ends:
                texts[token] = text

        found = cls(dict(sorted(texts.items())), ends, strips, encode)
        return found if texts and found._is_what(tokenizer) else None

    def _is_what(self, tokenizer: Any) -> bool:
        """Whether the tokenizer decodes to the bytes of these tokens."""
        step = max(1, len(self.texts) // _CHECKED)
        tokens = list(self.texts)[::step]
        written = b"".join(self.texts[token] for token in tokens)
        if self.strips_space and written.startswith(b" "):
            written = written[1:]
        text: str = tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # Decoders write broken characters in different ways.
        expected = written.decode(errors="replace")
        return text.replace("\ufffd", "") == expected.replace("\ufffd", "")


def _decoders(decoder: Any) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return {name for part in decoder["decoders"] for name in _decoders(part)}
    return {decoder["type"]}


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet, a printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(name: str) -> bytes:
    table = _byte_of()
    return bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()


def _sentence_piece(name: str) -> bytes:
    if (found := _BYTE.fullmatch(name)) is not None:
        return bytes([int(found[1], 16)])
    return name.replace(_WORD_START, " ").encode()
