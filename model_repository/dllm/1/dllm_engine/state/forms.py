"""Follows the structured outputs of running requests through their automata, on the host.

Of each it knows the state before its first masked position. Where only one token may follow, the
token is committed at once, without a forward pass (the scaffold of arXiv 2507.04504, where keys
and punctuation are fixed).
"""

from __future__ import annotations

import dataclasses

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


class Forms:
    """The automata of the slots that have one."""

    def __init__(self) -> None:
        self._by_slot: dict[int, _Form] = {}

    def fill(self, slot: int, automaton: TokenAutomaton | None, start: int) -> None:
        """Begin a request, whose canvas begins at position `start`; None: its text is free."""
        self._by_slot.pop(slot, None)
        if automaton is not None:
            self._by_slot[slot] = _Form(automaton, start, automaton.start)

    def holds(self, slots: list[int]) -> list[int]:
        """Those of the slots that have an automaton."""
        return [slot for slot in slots if slot in self._by_slot] if self._by_slot else []

    def fix(self, slot: int, tokens: Array, masked: Array, canvas_start: int, end: int) -> range:
        """Write the tokens that are certain behind what is decided.

        Args:
            slot: which request.
            tokens: its sequence; written to.
            masked: its canvas, true where masked; written to.
            canvas_start: the canvas's first position.
            end: no position from here on is written.

        Returns:
            The positions that were looked at; those that were masked are written.
        """
        form = self._by_slot[slot]
        first = form.position
        while form.position < end:
            if masked[form.position - canvas_start]:
                token = int(form.automaton.fixed[form.state])
                if token < 0:
                    break
                tokens[form.position] = token
                masked[form.position - canvas_start] = False
            token = int(tokens[form.position])
            form.state = form.automaton.next_state(form.state, token)
            form.position += 1
        return range(first, form.position)

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
            of_request = (blocks.request == r) & (blocks.positions < state.answer_end[r])
            index = of_request.nonzero()[0].tolist()
            if not index:
                continue
            end = int(min(state.block_end[r], state.answer_end[r]))
            if state.opens[r]:  # the block's first token alone
                end = int(blocks.positions[index[-1]]) + 1
            canvas = slice(form.position - state.canvas_start[r], end - state.canvas_start[r])
            path = tokens[slot, form.position : end].copy()
            path[masked[slot, canvas]] = -1
            spans.append(Span(form.automaton, form.state, path, int(state.answer_end[r]) - end))
            rows += index
        return FormRows(rows, spans) if rows else None
