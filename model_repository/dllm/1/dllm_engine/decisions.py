"""Decisions: typed questions about a text, answered by probabilities from one forward each.

Each question has a canvas of its own: several slots in one canvas disturb each other. Nothing is
decoded, so no step follows the first one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dllm_engine.errors import InvalidRequest
from dllm_engine.readings import Read, Readings, joined, read_candidates, read_tokens
from dllm_engine.tokenizer import Tokenizer

#: Limits of OpenAI's API.
MAX_QUESTIONS, MAX_CHOICES = 400, 255
#: Up to so many options are answered by a letter; more by their own words.
MAX_LETTERS = 10
LETTERS = "ABCDEFGHIJ"
#: Wordings of yes and no, whose log-probabilities are averaged.
WORDINGS = (("yes", "no"), ("Yes", "No"), ("true", "false"), ("True", "False"))
TYPES = ("predicate", "choice", "score")

Answer = dict[str, Any]


def read_decisions(
    text: Any, questions: Any, tokenizer: Tokenizer | None, mask: int, *, blockwise: bool
) -> Readings[list[Answer]]:
    """Plan the readings of some questions about one text.

    Args:
        text: a text, or chat messages.
        questions: each an object with `type` (predicate, choice or score), `instructions`, and
            `choices` (value, description) or `levels` (label, description); `name` is returned.

    Returns:
        Readings whose answers are in the order of the questions, shaped as OpenAI's are.

    Raises:
        InvalidRequest: names the field and the limit.
    """
    if tokenizer is None:
        raise InvalidRequest("questions", "this checkpoint has no tokenizer")
    if not isinstance(questions, list | tuple) or not 1 <= len(questions) <= MAX_QUESTIONS:
        got = len(questions) if isinstance(questions, list | tuple) else type(questions).__name__
        raise InvalidRequest("questions", f"must be 1 to {MAX_QUESTIONS}; got {got}")
    messages = _messages(text)
    asker = _Asker(messages, tokenizer, mask, blockwise)
    return joined([asker.ask(i, question) for i, question in enumerate(questions)])


class _Asker:
    def __init__(
        self, messages: list[dict[str, str]], tokenizer: Tokenizer, mask: int, blockwise: bool
    ) -> None:
        self._messages, self._tokenizer = messages, tokenizer
        self._mask, self._blockwise = mask, blockwise

    def ask(self, index: int, question: Any) -> Readings[Answer]:
        field = f"questions.{index}"
        if not isinstance(question, Mapping):
            raise InvalidRequest(field, "must be an object")
        kind, instructions = question.get("type"), question.get("instructions")
        if kind not in TYPES:
            raise InvalidRequest(f"{field}.type", f"must be {', '.join(TYPES)}; got {kind!r}")
        if not isinstance(instructions, str) or not instructions:
            raise InvalidRequest(f"{field}.instructions", "must be a text, not empty")
        same = {"type": kind, "name": question.get("name")}
        if kind == "predicate":
            return self._predicate(instructions, same)
        if kind == "choice":
            return self._choice(f"{field}.choices", question, same)
        return self._score(f"{field}.levels", question, same)

    def _predicate(self, instructions: str, same: Answer) -> Readings[Answer]:
        context = self._context(f"{instructions}\nAnswer yes or no.")
        pairs = [(self._first(yes), self._first(no)) for yes, no in WORDINGS]
        pairs = [(yes, no) for yes, no in pairs if yes != no]
        if not pairs:
            raise InvalidRequest("questions", "this checkpoint's tokens cannot tell yes from no")
        found = read_tokens(context, [token for pair in pairs for token in pair], self._mask)

        def answer(reads: Sequence[Read]) -> Answer:
            values = np.array(found.answer(reads)).reshape(-1, 2)
            yes, _ = probabilities(values.mean(axis=0).tolist())
            return same | {"probability": yes}

        return Readings(found.prompts, answer)

    def _choice(self, field: str, question: Mapping[str, Any], same: Answer) -> Readings[Answer]:
        choices = _options(field, question.get("choices"), "value", (str, bool))
        values = [choice["value"] for choice in choices]
        texts = [json.dumps(v) if isinstance(v, bool) else v for v in values]
        found = self._options(question["instructions"], texts, choices, letters=True)

        def answer(reads: Sequence[Read]) -> Answer:
            p = probabilities(found.answer(reads))
            best = int(np.argmax(p))
            shown = [{"value": v, "probability": x} for v, x in zip(values, p, strict=True)]
            return same | {"choice": values[best], "confidence": p[best], "probabilities": shown}

        return Readings(found.prompts, answer)

    def _score(self, field: str, question: Mapping[str, Any], same: Answer) -> Readings[Answer]:
        levels = _options(field, question.get("levels"), "label", (str,))
        labels = [level["label"] for level in levels]
        found = self._options(question["instructions"], labels, levels, letters=False)

        def answer(reads: Sequence[Read]) -> Answer:
            p = probabilities(found.answer(reads))
            shown = [
                {"label": label, "value": i, "probability": x}
                for i, (label, x) in enumerate(zip(labels, p, strict=True))
            ]
            mean = float(np.dot(np.arange(len(p)), p))
            return same | {"score": mean, "confidence": max(p), "probabilities": shown}

        return Readings(found.prompts, answer)

    def _options(
        self,
        instructions: str,
        texts: list[str],
        options: Sequence[Mapping[str, Any]],
        *,
        letters: bool,
    ) -> Readings[list[float]]:
        """Read a log-probability for each option: of its letter, or of its words."""
        by_letter = letters and len(texts) <= MAX_LETTERS
        tokens = [self._first(letter) for letter in LETTERS[: len(texts)]]
        by_letter = by_letter and len(set(tokens)) == len(texts)
        marks = [f"{letter}. " for letter in LETTERS] if by_letter else ["- "] * len(texts)
        lines = [instructions]
        for mark, text, option in zip(marks, texts, options, strict=False):
            described = option.get("description")
            lines.append(f"{mark}{text}: {described}" if described else f"{mark}{text}")
        lines.append("Answer with the letter." if by_letter else "Answer with one of these.")
        context = self._context("\n".join(lines))
        if by_letter:
            return read_tokens(context, tokens, self._mask)
        encoded = [self._tokenizer.encode_suffix(text) for text in texts]
        return read_candidates(context, encoded, self._mask, blockwise=self._blockwise)

    def _context(self, question: str) -> list[int]:
        *before, last = self._messages
        if last["role"] == "user":
            messages = [*before, last | {"content": f"{last['content']}\n\n{question}".strip()}]
        else:
            messages = [*self._messages, {"role": "user", "content": question}]
        return self._tokenizer.encode_messages(json.dumps(messages))

    def _first(self, word: str) -> int:
        return self._tokenizer.encode_suffix(word)[0]


def probabilities(scores: Sequence[float]) -> list[float]:
    """Softmax of log-probabilities."""
    values = np.asarray(scores, np.float64)
    weights = np.exp(values - values.max())
    found: list[float] = (weights / weights.sum()).tolist()
    return found


def _messages(text: Any) -> list[dict[str, str]]:
    if isinstance(text, str):
        return [{"role": "user", "content": text}]
    shape = "must be a text, or a list of messages, each with role and content"
    if not isinstance(text, list | tuple) or not text:
        raise InvalidRequest("input", shape)
    messages = []
    for message in text:
        fits = isinstance(message, Mapping) and set(message) == {"role", "content"}
        if not fits or not all(isinstance(value, str) for value in message.values()):
            raise InvalidRequest("input", shape)
        messages.append(dict(message))
    return messages


def _options(
    field: str, options: Any, key: str, types: tuple[type, ...]
) -> Sequence[Mapping[str, Any]]:
    """Check the options of a question.

    Raises:
        InvalidRequest: there are too few or too many, two are the same, or one is unusable.
    """
    if not isinstance(options, list | tuple) or not 2 <= len(options) <= MAX_CHOICES:
        got = len(options) if isinstance(options, list | tuple) else type(options).__name__
        raise InvalidRequest(field, f"must be 2 to {MAX_CHOICES}; got {got}")
    seen = set()
    for i, option in enumerate(options):
        value = option.get(key) if isinstance(option, Mapping) else None
        if not isinstance(value, types) or value == "":
            names = " or ".join("a text, not empty" if t is str else "true or false" for t in types)
            raise InvalidRequest(f"{field}.{i}.{key}", f"must be {names}")
        if not isinstance(option.get("description"), str | None):
            raise InvalidRequest(f"{field}.{i}.description", "must be a text")
        if (type(value), value) in seen:
            raise InvalidRequest(f"{field}.{i}.{key}", f"{value!r} is there twice")
        seen.add((type(value), value))
    return options
