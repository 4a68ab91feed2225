"""Automata over tokens, made from automata over bytes and a vocabulary.

Tokens that lead from every state to the same one are a class: with it, tables have a column for
each of some hundred classes instead of a hundred thousand tokens. Where the text has only one way
to go on, only the tokenizer's own spelling of it may be used, so that the token is fixed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from dllm_engine.errors import InvalidRequest
from dllm_engine.structured.byte_automaton import FIELD, ByteAutomaton
from dllm_engine.structured.vocabulary import Vocabulary

Array = npt.NDArray[Any]

#: Entries of the table of states and classes, and edges between states.
MAX_ENTRIES, MAX_EDGES = 2**24, 2**18
#: Distance of states that cannot end.
_NEVER = np.iinfo(np.int32).max // 2


@dataclasses.dataclass(frozen=True)
class TokenAutomaton:
    """Which tokens may follow each other; S states, C classes, E edges, T sets of classes.

    The last state is behind the answer's end: only end tokens lead there, and on from it.
    """

    start: int
    #: [V]; the class of each token, C where it is never allowed.
    class_of: Array
    #: The tokens of all classes, class by class, and [C], where each class begins.
    members: Array
    member_starts: Array
    #: [S, C] int32; the next state, -1 where there is none.
    delta: Array
    #: [E]; edges from state to state, in the order of their targets: source, and set of classes.
    source: Array
    edge_set: Array
    #: The states that edges lead to, and where the edges of each begin (one more at the end).
    targets: Array
    target_starts: Array
    #: The classes of all sets, and [T], where each set begins.
    set_classes: Array
    set_starts: Array
    #: [S] int32; tokens to the nearest end of a text.
    distance: Array
    #: [S] int32; tokens of the longest text from here, its end not counted; -1: there is no bound.
    longest: Array
    #: The tokens that end a text; the first is the one that is written.
    ends: Array
    #: [S] int32; the only token that may follow, -1 where there are several.
    fixed: Array

    @property
    def num_states(self) -> int:
        """S."""
        return len(self.delta)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text."""
        return int(self.distance[self.start])

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, np.ndarray))

    def next_state(self, state: int, token: int) -> int:
        """Follow an allowed token."""
        return int(self.delta[state, self.class_of[token]])

    def tokens_of(self, label: int) -> Array:
        """The tokens of a class."""
        end = self.member_starts[label + 1] if label + 1 < len(self.member_starts) else None
        members: Array = self.members[self.member_starts[label] : end]
        return members

    @classmethod
    def of(cls, texts: ByteAutomaton, vocabulary: Vocabulary, size: int) -> TokenAutomaton:
        """Make the automaton of tokens that write these texts.

        Args:
            texts: which texts are allowed.
            vocabulary: what each token writes.
            size: tokens of the model, of which the vocabulary may have fewer.

        Raises:
            InvalidRequest: it is too large, or the tokens cannot write any of the texts.
        """
        if vocabulary.strips_space:
            texts = texts.stripping_a_space()
        return _Builder(texts, vocabulary, size).build()


class _Builder:
    def __init__(self, texts: ByteAutomaton, vocabulary: Vocabulary, size: int) -> None:
        self._texts, self._vocabulary, self._size = texts, vocabulary, size
        self._num_texts = len(texts.delta)
        self._end = self._num_texts

    def build(self) -> TokenAutomaton:
        columns, token_class = self._columns()
        delta = np.full((self._num_texts + 1, len(columns) + 2), -1, np.int32)
        delta[:-1, : len(columns)] = columns.T
        # Two more classes: the end token that is written, and the others.
        written, other_ends = len(columns), len(columns) + 1
        accepting = self._texts.accepting.nonzero()[0]
        delta[accepting, written] = delta[accepting, other_ends] = self._end
        delta[self._end, written] = self._end
        for i, token in enumerate(self._vocabulary.ends):
            token_class[token] = other_ends if i else written
        distance = self._distances(delta)
        if distance[self._texts.start] >= _NEVER:
            raise InvalidRequest(FIELD, "this checkpoint's tokens cannot write any such text")
        delta[(delta >= 0) & (distance[delta] >= _NEVER)] = -1
        delta, fixed = self._with_fixed(delta, token_class)
        delta, fixed, number = self._reachable(delta, fixed)
        return self._finished(delta, fixed, token_class, int(number[self._texts.start]))

    def _columns(self) -> tuple[Array, Array]:
        """Next states by class of tokens, [C, states]; and the class of each token, [V]."""
        trie = self._vocabulary.trie
        symbols, symbol_of = np.unique(self._texts.delta, axis=1, return_inverse=True)
        symbol_of = symbol_of.reshape(-1)
        dead = self._num_texts
        table = np.full((dead + 1, symbols.shape[1]), dead, np.int32)
        table[:-1] = np.where(symbols < 0, dead, symbols)
        columns = [np.arange(dead + 1, dtype=np.int32)]
        known = {columns[0].tobytes(): 0}
        nothing = np.full(dead + 1, dead, np.int32)
        known[nothing.tobytes()] = -1
        column_of = np.full(trie.num_nodes, -1, np.int64)
        column_of[0], first = 0, 1
        for parents, last in trie.levels:
            before = column_of[parents]
            keys = np.where(before < 0, -1, before * symbols.shape[1] + symbol_of[last])
            pairs, where = np.unique(keys, return_inverse=True)
            found = np.full(len(pairs), -1, np.int64)
            for i, pair in enumerate(pairs.tolist()):
                if pair < 0:
                    continue
                column = table[columns[pair // symbols.shape[1]], pair % symbols.shape[1]]
                number = known.setdefault(column.tobytes(), len(columns))
                if number == len(columns):
                    columns.append(column)
                    if len(columns) * dead > MAX_ENTRIES:
                        raise self._too_large()
                found[i] = number
            column_of[first : first + len(parents)] = found[where.reshape(-1)]
            first += len(parents)
        used, label = np.unique(column_of[trie.nodes], return_inverse=True)
        token_class = np.full(self._size, -1, np.int64)
        token_class[trie.tokens] = used[label.reshape(-1)]
        alive = used[used >= 0]
        renumber = np.full(len(columns) + 1, -1, np.int64)
        renumber[alive] = np.arange(len(alive))
        token_class = renumber[token_class]
        stacked = np.stack([columns[i][:-1] for i in alive]) if len(alive) else np.zeros((0, dead))
        return np.where(stacked == dead, -1, stacked).astype(np.int32), token_class

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest(
            FIELD, f"its automaton over tokens is too large: at most {MAX_ENTRIES} entries"
        )

    def _distances(self, delta: Array) -> Array:
        """Tokens from each state to the nearest end of a text: [S]."""
        distance = np.full(len(delta), _NEVER, np.int32)
        distance[:-1][self._texts.accepting] = 0
        distance[self._end] = 0
        sources, labels = (delta >= 0).nonzero()
        pairs = np.unique(np.stack([sources, delta[sources, labels]]), axis=1)
        for _ in range(len(delta)):
            through = distance[pairs[1]] + 1
            before = distance.copy()
            np.minimum.at(distance, pairs[0], through)
            if (before == distance).all():
                break
        return distance

    def _with_fixed(self, delta: Array, token_class: Array) -> tuple[Array, Array]:
        """Leave one token where the text has one way to go on; fixed tokens become classes."""
        num_next = (self._texts.delta >= 0).sum(axis=1)
        forced = (num_next == 1) & ~self._texts.accepting
        only_byte = self._texts.delta.argmax(axis=1)
        fixed = np.full(len(delta), -1, np.int64)
        first_end = self._vocabulary.ends[0]
        fixed[self._end] = first_end
        fixed[:-1][self._texts.accepting & (num_next == 0)] = first_end
        own_class: dict[int, int] = {}
        extra: list[Array] = []
        for start in forced.nonzero()[0].tolist():
            state, text = start, bytearray()
            while forced[state] and len(text) < 1024:
                text.append(int(only_byte[state]))
                state = int(self._texts.delta[state, only_byte[state]])
            token = self._spelling(bytes(text), delta, start, token_class)
            if token >= 0:
                fixed[start] = token
                if token not in own_class:
                    own_class[token] = delta.shape[1] + len(extra)
                    extra.append(delta[:, token_class[token]])
        if extra:
            delta = np.concatenate([delta, np.stack(extra, axis=1)], axis=1)
            for token, label in own_class.items():
                token_class[token] = label
        if delta.size > MAX_ENTRIES:
            raise self._too_large()
        for state in (fixed >= 0).nonzero()[0].tolist():
            label = token_class[fixed[state]]
            target = delta[state, label]
            delta[state] = -1
            delta[state, label] = target
        return delta, fixed

    def _spelling(self, text: bytes, delta: Array, start: int, token_class: Array) -> int:
        """The first token of the tokenizer's spelling of a text, -1 if it cannot be used."""
        tokens, state = self._vocabulary.canonical(text), start
        for token in tokens:
            state = -1 if token_class[token] < 0 else int(delta[state, token_class[token]])
            if state < 0:
                return -1
        return tokens[0] if tokens else -1

    def _reachable(self, delta: Array, fixed: Array) -> tuple[Array, Array, Array]:
        """Drop states that no tokens lead to; returns the new number of each state as well."""
        reached = np.zeros(len(delta), np.bool_)
        reached[self._texts.start] = reached[self._end] = True
        todo = np.array([self._texts.start, self._end])
        while len(todo):
            following = np.unique(delta[todo])
            following = following[following >= 0]
            todo = following[~reached[following]]
            reached[todo] = True
        number = np.where(reached, np.cumsum(reached) - 1, -1)
        self._accepting = np.append(self._texts.accepting, True)[reached]
        return np.append(number, -1)[delta[reached]].astype(np.int32), fixed[reached], number

    def _finished(
        self, delta: Array, fixed: Array, token_class: Array, start: int
    ) -> TokenAutomaton:
        # Classes that no token has, or that are allowed nowhere, are dropped.
        used = np.zeros(delta.shape[1] + 1, np.bool_)
        used[token_class] = True
        used = used[:-1] & (delta >= 0).any(axis=0)
        label = np.append(np.where(used, np.cumsum(used) - 1, -1), -1)
        delta = np.ascontiguousarray(delta[:, used])
        num_classes = delta.shape[1]
        token_class = label[token_class]
        class_of = np.where(token_class < 0, num_classes, token_class).astype(np.int32)
        order = np.argsort(class_of, kind="stable")
        member_starts = np.searchsorted(class_of[order], np.arange(num_classes + 1))
        members = order[: member_starts[-1]]
        edges, sets = self._edges(delta)
        source, target, edge_set = np.array(edges, np.int64).T
        order = np.lexsort((source, target))
        source, target, edge_set = source[order], target[order], edge_set[order]
        targets, starts = np.unique(target, return_index=True)
        sizes = np.array([len(s) for s in sets])
        return TokenAutomaton(
            start=start,
            class_of=class_of,
            members=members,
            member_starts=member_starts[:-1],
            delta=delta,
            source=source,
            edge_set=edge_set,
            targets=targets,
            target_starts=np.append(starts, len(source)),
            set_classes=np.concatenate(sets),
            set_starts=sizes.cumsum() - sizes,
            distance=self._final_distances(delta),
            longest=_longest(source, target, len(delta)),
            ends=np.array(self._vocabulary.ends, np.int64),
            fixed=fixed.astype(np.int32),
        )

    def _edges(self, delta: Array) -> tuple[list[tuple[int, int, int]], list[Array]]:
        """Source, target and set of classes of each edge; and the sets."""
        edges: list[tuple[int, int, int]] = []
        sets: list[Array] = []
        known: dict[bytes, int] = {}
        for state, row in enumerate(delta):
            labels = (row >= 0).nonzero()[0]
            targets = row[labels]
            order = np.argsort(targets, kind="stable")
            labels, targets = labels[order], targets[order]
            cuts = (np.diff(targets) != 0).nonzero()[0] + 1
            for part in np.split(labels, cuts):
                if not len(part):
                    continue
                number = known.setdefault(part.tobytes(), len(sets))
                if number == len(sets):
                    sets.append(part)
                edges.append((state, int(row[part[0]]), number))
            if len(edges) > MAX_EDGES:
                problem = f"its automaton over tokens is too large: at most {MAX_EDGES} edges"
                raise InvalidRequest(FIELD, problem)
        return edges, sets

    def _final_distances(self, delta: Array) -> Array:
        distance = np.where(self._accepting, 0, _NEVER).astype(np.int32)
        sources, labels = (delta >= 0).nonzero()
        pairs = np.unique(np.stack([sources, delta[sources, labels]]), axis=1)
        while True:
            before = distance.copy()
            np.minimum.at(distance, pairs[0], distance[pairs[1]] + 1)
            if (before == distance).all():
                return distance


def _longest(source: Array, target: Array, num_states: int) -> Array:
    """Edges of the longest path from each state to the last one; -1 if there is a circle."""
    end = num_states - 1
    open_edges = np.bincount(source, minlength=num_states)
    open_edges[end] = 0
    longest = np.full(num_states, -1, np.int32)
    first = np.searchsorted(target, np.arange(num_states + 1))
    steps, todo = np.zeros(num_states, np.int32), [end]
    while todo:
        state = todo.pop()
        # An edge to the end writes no text.
        longest[state] = max(0, steps[state])
        for before in source[first[state] : first[state + 1]].tolist():
            if before == end:
                continue
            steps[before] = max(steps[before], longest[state] + (state != end))
            open_edges[before] -= 1
            if not open_edges[before]:
                todo.append(before)
    return longest
