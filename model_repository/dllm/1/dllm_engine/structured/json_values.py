"""Types and equality of JSON values, as JSON Schema has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The types of JSON Schema.
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def is_of(value: Any, kind: str) -> bool:
    """Whether a JSON value has this type of JSON Schema."""
    match kind:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case "integer":
            return (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and value == int(value)
            )
        case _:
            return isinstance(value, int | float) and not isinstance(value, bool)


def equal(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal; true is not 1."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def _constants(schema: Any) -> list[Any] | None:
    if isinstance(schema, Mapping):
        if isinstance(schema.get("enum"), list):
            return list(schema["enum"])
        if "const" in schema:
            return [schema["const"]]
    return None


def _types(schema: Any) -> set[str]:
    values = _constants(schema)
    if values is not None:
        found = {kind for kind in TYPES for value in values if is_of(value, kind)}
    elif isinstance(schema, Mapping) and "type" in schema:
        kinds = schema["type"]
        found = {kinds} if isinstance(kinds, str) else set(kinds)
    else:
        return set(TYPES)
    return found | ({"number"} if "integer" in found else set())


def are_disjoint(one: Any, other: Any) -> bool:
    """Whether no value is certain to be valid under both, as far as types and constants tell."""
    if not _types(one) & _types(other):
        return True
    values, others = _constants(one), _constants(other)
    if values is not None and others is not None:
        return not any(equal(a, b) for a in values for b in others)
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return False
    if _types(one) != {"object"} or _types(other) != {"object"}:
        return False
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    for name in shared:
        left, right = (s.get("properties", {}).get(name) for s in (one, other))
        if left is not None and right is not None and are_disjoint(left, right):
            return True
    return False
