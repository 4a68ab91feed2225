"""Builds the automaton of one regular expression in a process of its own, within limits.

Reads the expression from stdin as UTF-8; writes to stdout, in this machine's byte order, as int32:
the number of states Q, the start, the number of accepting states and those states, then [Q, 256]
transitions by byte, -1 where there is none. What goes wrong is said on stderr. It must not import
`dllm_engine`: torch takes seconds and gigabytes.
"""

from __future__ import annotations

import resource
import sys
from array import array

#: Limits of the process: seconds of CPU time, bytes of memory; and states of the result.
CPU_SECONDS, MEMORY_BYTES, MAX_STATES = 2, 2**30, 16384
#: Exit statuses.
TOO_LARGE, NOT_A_REGEX, NOT_INSTALLED = 3, 4, 5


def main() -> int:
    """Build one automaton; returns the exit status."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return NOT_INSTALLED
    expression = sys.stdin.buffer.read().decode()
    # Each byte is a token, so the index over tokens is the automaton over bytes.
    every_byte = Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    try:
        index = Index(expression, every_byte)
    except ValueError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return NOT_A_REGEX
    found = index.get_transitions()
    start, accepting = index.get_initial_state(), index.get_final_states()
    states = {start, *found, *accepting}
    for row in found.values():
        states.update(row.values())
    if len(states) > MAX_STATES:
        print(f"{len(states)} states", file=sys.stderr)  # noqa: T201
        return TOO_LARGE
    number = {state: i for i, state in enumerate(states)}
    result = array("i", [len(number), number[start], len(accepting)])
    result.extend(number[state] for state in accepting)
    for state in states:
        row = array("i", [-1]) * 256
        for byte, target in found.get(state, {}).items():
            if byte < 256:
                row[byte] = number[target]
        result.extend(row)
    sys.stdout.buffer.write(result.tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
