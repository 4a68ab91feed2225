"""Hooks for schemathesis: bodies thinned out, so that some of them reach the engine.

What the schema allows one by one often excludes one another; a body with every field is refused.
"""

import zlib
from typing import Any

import schemathesis

PROMPTS = ("prompt", "messages", "input_ids")
#: Of the fields that are no prompt, one in so many stays.
THINNING = 6


@schemathesis.hook
def map_body(_context: Any, body: Any) -> Any:
    """Ask in one way, with a few of the options."""
    if not isinstance(body, dict):
        return body
    salt = repr(sorted(body.items(), key=lambda item: item[0]))
    thin = {
        name: value
        for name, value in body.items()
        if name in (*PROMPTS, "prompts", "model")
        or zlib.crc32(f"{name}{salt}".encode(errors="replace")) % THINNING == 0
    }
    given = [name for name in PROMPTS if thin.get(name) is not None]
    for name in given[1:]:
        del thin[name]
    return thin
