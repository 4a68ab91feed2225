"""Deterministic automata over bytes, from regular expressions."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dllm_engine.errors import InvalidRequest
from dllm_engine.structured import dfa_worker

Array = npt.NDArray[Any]

FIELD = "structured_outputs"
#: Characters of a regular expression, also of one that a schema becomes.
MAX_EXPRESSION = 2**19
#: States of a minimal automaton.
MAX_STATES = 4096
#: The worker limits its CPU time; this is for a machine that is too busy to give it any.
_WALL_SECONDS = 30.0
_TOO_LARGE = (
    f"its automaton is too large: at most {MAX_STATES} states, built within "
    f"{dfa_worker.CPU_SECONDS} s and {dfa_worker.MEMORY_BYTES >> 20} MiB"
)


@dataclasses.dataclass(frozen=True)
class ByteAutomaton:
    """A deterministic automaton in which every state can be reached, and can accept in the end."""

    #: [Q, 256] int32; the next state by byte, -1 where there is none.
    delta: Array
    start: int
    #: [Q] bool.
    accepting: Array

    @classmethod
    def of(cls, expression: str) -> ByteAutomaton:
        """Build the minimal automaton of a regular expression that must match whole texts.

        The syntax is that of Rust's crate regex. `outlines-core` builds the automaton, in a process
        of its own with limits on time and memory, since some expressions need exponentially many
        states. No text may hold NUL: a NUL is put before each, since the library also prepares for
        a match that begins anywhere, and counted repetitions would have it try all places at once.

        Raises:
            InvalidRequest: it is no regular expression, matches nothing, or is too large.
        """
        if len(expression) > MAX_EXPRESSION:
            raise InvalidRequest(FIELD, _TOO_LARGE)
        try:
            text = rf"\x00(?:{expression})".encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(FIELD, f"not encodable as UTF-8: {error}") from error
        numbers = np.frombuffer(_run_worker(text), np.int32)
        count, start, num_accepting = numbers[:3].tolist()
        accepting = np.zeros(count, np.bool_)
        accepting[numbers[3 : 3 + num_accepting]] = True
        delta = numbers[3 + num_accepting :].reshape(count, 256)
        start = int(delta[start, 0])
        found = None if start < 0 else _trimmed(delta, start, accepting)
        if found is None:
            raise InvalidRequest(FIELD, "no text matches")
        found = _minimal(found)
        if len(found.delta) > MAX_STATES:
            raise InvalidRequest(FIELD, _TOO_LARGE)
        return found

    def accepts(self, text: bytes) -> bool:
        """Whether the whole text matches; for tests."""
        state = self.start
        for byte in text:
            state = int(self.delta[state, byte])
            if state < 0:
                return False
        return bool(self.accepting[state])

    def stripping_a_space(self) -> ByteAutomaton:
        """The automaton of the texts that are in this language once a leading space is dropped.

        Decoders of SentencePiece vocabularies drop it.
        """
        space = ord(" ")
        first = self.delta[self.start].copy()
        first[space] = self.start
        delta = np.vstack([self.delta, first])
        accepting = np.append(self.accepting, self.accepting[self.start])
        return ByteAutomaton(delta, len(delta) - 1, accepting)


def _run_worker(expression: bytes) -> bytes:
    python = sys.executable or shutil.which("python3") or "python3"
    try:
        done = subprocess.run(
            [python, "-P", str(Path(dfa_worker.__file__))],
            input=expression,
            capture_output=True,
            timeout=_WALL_SECONDS,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidRequest(FIELD, _TOO_LARGE) from error
    if done.returncode == 0:
        return done.stdout
    message = done.stderr.decode(errors="replace").strip()
    if done.returncode == dfa_worker.NOT_INSTALLED:
        problem = "this server has no package outlines-core, which they need"
        raise InvalidRequest(FIELD, problem)
    if done.returncode == dfa_worker.NOT_A_REGEX:
        last = message.splitlines()[-1] if message else "unknown"
        raise InvalidRequest(FIELD, f"not a regular expression that can be held: {last}")
    raise InvalidRequest(FIELD, _TOO_LARGE)


def _trimmed(delta: Array, start: int, accepting: Array) -> ByteAutomaton | None:
    """Keep the states that can be reached and can accept; None if the start cannot."""
    source, byte = (delta >= 0).nonzero()
    target = delta[source, byte]
    useful = _closure(source, target, np.arange(len(delta)) == start)
    useful &= _closure(target, source, accepting)
    if not useful[start]:
        return None
    number = np.append(np.where(useful, np.cumsum(useful) - 1, -1), -1)
    return ByteAutomaton(
        number[delta[useful]].astype(np.int32), int(number[start]), accepting[useful]
    )


def _closure(source: Array, target: Array, seed: Array) -> Array:
    """The states that edges lead to from `seed`: bool [Q]."""
    pairs = np.unique(np.stack([source, target]), axis=1)
    order = np.argsort(pairs[0], kind="stable")
    first = np.searchsorted(pairs[0][order], np.arange(len(seed) + 1))
    targets = pairs[1][order]
    reached = seed.copy()
    todo = seed.nonzero()[0].tolist()
    while todo:
        state = todo.pop()
        for other in targets[first[state] : first[state + 1]].tolist():
            if not reached[other]:
                reached[other] = True
                todo.append(other)
    return reached


def _minimal(automaton: ByteAutomaton) -> ByteAutomaton:
    """Merge states that accept the same texts (Moore's refinement, on 64-bit hashes)."""
    # Bytes with equal columns are one symbol.
    symbols = np.unique(automaton.delta, axis=1)
    count = len(symbols)
    random = np.random.default_rng(0)
    factor = random.integers(1, 2**63, symbols.shape[1], np.uint64) | np.uint64(1)
    dead = random.integers(1, 2**63, 1, np.uint64)
    label = np.where(automaton.accepting, np.uint64(3), np.uint64(5))
    classes = 0
    while True:
        following = np.append(label, dead)[symbols]
        following ^= following >> np.uint64(29)
        mixed = label * np.uint64(0x9E3779B97F4A7C15) + (following * factor).sum(axis=1)
        mixed ^= mixed >> np.uint64(32)
        values, number = np.unique(mixed, return_inverse=True)
        if len(values) == classes or len(values) == count:
            break
        classes, label = len(values), mixed
    _, first = np.unique(number, return_index=True)
    delta = np.append(number, -1)[automaton.delta[first]].astype(np.int32)
    return ByteAutomaton(delta, int(number[automaton.start]), automaton.accepting[first])
