"""How much a run of the tests tries: `make test` less, `make test-slow` all."""

from __future__ import annotations

from hypothesis import settings

#: Profiles of hypothesis. No example has a deadline: its time depends on how busy the machine is.
CHANGE, FULL = "change", "full"


def register_profiles() -> None:
    """Register both profiles; `change` is in effect unless pytest's option names another."""
    for name in (CHANGE, FULL):
        settings.register_profile(name, deadline=None)
    settings.load_profile(CHANGE)


def examples(count: int) -> int:
    """Number of examples of an expensive property test: `count` in full, a third for a change."""
    return count if settings.get_current_profile_name() == FULL else -(-count // 3)
