"""Follows the structured outputs of running requests through their automata, on the host.

Of each it knows the state before its first masked position. Where only one token may follow, the
token is committed at once, without a forward pass (the scaffold of arXiv 2507.04504, where keys
and punctuation are fixed).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dllm_engine.ops.transfer import Array
from dllm_engine.state.slots import SlotState
from dllm_engine.state.step_plan import Blocks, FormRows
from dllm_engine.structured.best_text import Span
from dllm_engine.structured.token_automaton import TokenAutomaton


@dataclasses.dataclass
class _Form:
    automaton: TokenAutomaton
    #: The first position that is masked, and the state before it.
    position: int
    state: int
    #: No text stands from here on: end tokens do, or the canvas is over.
    limit: int


class Forms:
    """The automata of the slots that have one."""

    def __init__(self) -> None:
        self._by_slot: dict[int, _Form] = {}

    def fill(self, slot: int, automaton: TokenAutomaton | None, start: int, end: int) -> None:
        """Begin a request with a canvas from `start` to before `end`; None: its text is free."""
        self._by_slot.pop(slot, None)
        if automaton is not None:
            self._by_slot[slot] = _Form(automaton, start, automaton.start, end)

    def holds(self, slots: list[int]) -> list[int]:
        """Those of the slots that have an automaton."""
        return [slot for slot in slots if slot in self._by_slot] if self._by_slot else []

    def fix(self, slot: int, tokens: Array, masked: Array, start: int, end: int | None) -> None:
        """Write the tokens that are certain: behind what is decided, and where no text can stand.

        Args:
            slot: which request.
            tokens: its sequence; written to.
            masked: its canvas, true where masked; written to.
            start: the canvas's first position.
            end: write nothing from here on, nor end tokens behind a text that is not finished;
                None: write all.
        """
        form = self._by_slot[slot]
        automaton, last = form.automaton, form.limit
        self._follow(form, tokens, masked, start, last if end is None else end)
        if end is not None or form.position >= form.limit:
            return
        rest = slice(form.position, form.limit)
        ends = np.isin(tokens[rest], automaton.ends)
        ends &= ~masked[form.position - start : form.limit - start]
        if ends.any():  # behind an end token there are only more
            form.limit = form.position + int(ends.argmax())
        if (longest := int(automaton.longest[form.state])) >= 0:
            form.limit = min(form.limit, form.position + longest)
        if form.limit < last:
            hidden = masked[form.limit - start : last - start]
            tokens[form.limit : last][hidden] = automaton.ends[0]
            hidden[:] = False
            self._follow(form, tokens, masked, start, last)

    def _follow(self, form: _Form, tokens: Array, masked: Array, start: int, end: int) -> None:
        """Move over decided tokens, and over those that are the only ones possible."""
        while form.position < end:
            if masked[form.position - start]:
                token = int(form.automaton.fixed[form.state])
                if token < 0:
                    return
                tokens[form.position] = token
                masked[form.position - start] = False
            form.state = form.automaton.next_state(form.state, int(tokens[form.position]))
            form.position += 1

    def rows(
        self, state: SlotState, blocks: Blocks, tokens: Array, masked: Array
    ) -> FormRows | None:
        """The masked positions of a step that an automaton decides; None if there are none.

        Args:
            state: the requests of the step.
            blocks: their active blocks.
            tokens, masked: of all slots; see `CanvasTable`.
        """
        if not self._by_slot:
            return None
        spans: list[Span] = []
        rows: list[int] = []
        for r, slot in enumerate(state.slots.tolist()):
            form = self._by_slot.get(slot)
            if form is None:
                continue
            of_request = (blocks.request == r) & (blocks.positions < form.limit)
            index = of_request.nonzero()[0].tolist()
            if not index:
                continue
            end = min(int(state.block_end[r]), form.limit)
            if state.opens[r]:  # the block's first token alone
                end = int(blocks.positions[index[-1]]) + 1
            canvas = slice(form.position - state.canvas_start[r], end - state.canvas_start[r])
            path = tokens[slot, form.position : end].copy()
            path[masked[slot, canvas]] = -1
            spans.append(Span(form.automaton, form.state, path, form.limit - end))
            rows += index
        return FormRows(rows, spans) if rows else None
