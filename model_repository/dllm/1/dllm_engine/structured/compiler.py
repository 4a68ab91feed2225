"""Compiles the field `structured_outputs`, and keeps what it has compiled."""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Mapping
from typing import Any

from dllm_engine.errors import InvalidRequest
from dllm_engine.structured import regex
from dllm_engine.structured.byte_automaton import FIELD, MAX_EXPRESSION, ByteAutomaton
from dllm_engine.structured.json_schema import any_object, expression_of
from dllm_engine.structured.patterns import Unsupported, whole_text
from dllm_engine.structured.token_automaton import TokenAutomaton
from dllm_engine.structured.vocabulary import Vocabulary

#: Forms of a text; exactly one is given. The others put fixed text around it.
FORMS = ("json", "regex", "choice", "json_object")
AROUND = ("prefix", "suffix")
#: Most choices.
MAX_CHOICES = 4096
#: Characters that answers do not exceed: limits of strings and arrays beyond it limit nothing.
LONGEST_TEXT = 2**20
#: Bytes of kept automata.
_MAX_KEPT = 2**28


class Compiler:
    """Compiles and caches automata; thread-safe.

    Args:
        vocabulary: None: this checkpoint's tokens cannot be read as bytes.
        vocab_size: tokens of the model.
    """

    def __init__(self, vocabulary: Vocabulary | None, vocab_size: int) -> None:
        self._vocabulary, self._size = vocabulary, vocab_size
        self._kept: collections.OrderedDict[str, TokenAutomaton | InvalidRequest] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()
        #: One compilation at a time: each may take a second of a core.
        self._compiling = threading.Lock()

    def automaton(self, wanted: Mapping[str, Any], gen_length: int) -> TokenAutomaton:
        """The automaton of a request's `structured_outputs`.

        Args:
            wanted: the field.
            gen_length: tokens that the text may have.

        Raises:
            InvalidRequest: it cannot be held, says why; or its shortest text is too long.
        """
        if self._vocabulary is None:
            problem = "this checkpoint has no tokenizer whose tokens can be read as bytes"
            raise InvalidRequest(FIELD, problem)
        found = self._found(wanted)
        if found.shortest > gen_length:
            raise InvalidRequest(
                FIELD,
                f"the shortest text has {found.shortest} tokens; gen_length is {gen_length}",
            )
        return found

    def _found(self, wanted: Mapping[str, Any]) -> TokenAutomaton:
        # Not sorted: properties are written in their order.
        key = json.dumps(wanted)
        found = self._lookup(key)
        if found is None:
            with self._compiling:
                found = self._lookup(key)
                if found is None:
                    try:
                        found = self._compiled(wanted)
                    except InvalidRequest as error:
                        found = error
                    self._keep(key, found)
        if isinstance(found, InvalidRequest):
            raise InvalidRequest(FIELD, str(found).removeprefix(f"{FIELD}: "))
        return found

    def _lookup(self, key: str) -> TokenAutomaton | InvalidRequest | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: str, found: TokenAutomaton | InvalidRequest) -> None:
        def size(key: str, value: TokenAutomaton | InvalidRequest) -> int:
            return len(key) + (value.nbytes if isinstance(value, TokenAutomaton) else 1000)

        with self._lock:
            self._kept[key] = found
            total = sum(size(*item) for item in self._kept.items())
            while total > _MAX_KEPT and len(self._kept) > 1:
                total -= size(*self._kept.popitem(last=False))

    def _compiled(self, wanted: Mapping[str, Any]) -> TokenAutomaton:
        assert self._vocabulary is not None
        texts = ByteAutomaton.of(text_expression(wanted, LONGEST_TEXT))
        return TokenAutomaton.of(texts, self._vocabulary, self._size)


def check(wanted: Any) -> None:
    """Check what can be checked without a checkpoint.

    Raises:
        InvalidRequest: names the part that is wrong.
    """
    if not isinstance(wanted, Mapping):
        raise InvalidRequest(FIELD, "must be an object")
    for name in wanted:
        if name not in (*FORMS, *AROUND):
            known = ", ".join((*FORMS, *AROUND))
            raise InvalidRequest(FIELD, f"{name} is not known; known are {known}")
    given = [name for name in FORMS if wanted.get(name) not in (None, False)]
    if len(given) != 1:
        rule = f"must have exactly one of {', '.join(FORMS)}"
        raise InvalidRequest(FIELD, f"{rule}; got {', '.join(given) or 'none'}")
    for name in ("regex", *AROUND):
        if not isinstance(wanted.get(name) or "", str):
            raise InvalidRequest(FIELD, f"{name} must be a string")
    choices = wanted.get("choice")
    if choices is not None:
        ok = isinstance(choices, list | tuple) and all(isinstance(c, str) for c in choices)
        if not ok or not 1 <= len(choices) <= MAX_CHOICES:
            raise InvalidRequest(FIELD, f"choice must be a list of 1 to {MAX_CHOICES} strings")
    if wanted.get("json_object") not in (None, True, False):
        raise InvalidRequest(FIELD, "json_object must be true")


def text_expression(wanted: Mapping[str, Any], longest: int) -> str:
    """The regular expression of all texts that are allowed; `wanted` is checked.

    Raises:
        InvalidRequest: it has what cannot be held.
    """
    inner = _form(wanted, longest)
    around = [wanted.get(name) or "" for name in AROUND]
    for text in (*around, *(wanted.get("choice") or ())):
        if "\x00" in text or "\ufffd" in text:
            raise InvalidRequest(FIELD, "no text may hold U+0000 or U+FFFD")
    before, behind = map(regex.literal, around)
    return f"{before}(?:{inner}){behind}"


def _form(wanted: Mapping[str, Any], longest: int) -> str:
    if (schema := wanted.get("json")) is not None:
        if isinstance(schema, str):
            if len(schema) > MAX_EXPRESSION:
                raise InvalidRequest(FIELD, "json is too large")
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(FIELD, f"json: {error}") from error
        return expression_of(schema, longest)
    if wanted.get("regex"):
        try:
            return whole_text(wanted["regex"])
        except Unsupported as error:
            raise InvalidRequest(FIELD, f"regex has what cannot be held: {error}") from error
    if choices := wanted.get("choice"):
        return regex.any_of(map(regex.literal, choices))
    return any_object()
