"""Hooks for schemathesis: calls that the schema allows, made so that they reach the engine."""

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(_context: Any, body: Any) -> Any:
    """Ask for the model that is there: any other name is only ever answered with 404."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = "dllm"
    return body
