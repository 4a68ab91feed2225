"""Translates a JSON schema to a regular expression that matches valid, compact JSON.

Whatever matches is valid; not all that is valid matches. Objects have the keys that the schema
names, in its order, each once; there is no whitespace between tokens. What a regular expression
cannot hold is refused by keyword and path, never left out. Recursion is cut at `MAX_DEPTH`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from dllm_engine.errors import InvalidRequest
from dllm_engine.structured import regex
from dllm_engine.structured.byte_automaton import FIELD, MAX_EXPRESSION
from dllm_engine.structured.json_numbers import decimals, whole_bounds
from dllm_engine.structured.json_values import TYPES, are_disjoint, equal, is_of
from dllm_engine.structured.patterns import Unsupported, inside_json_string

Schema = Mapping[str, Any]

#: How often a `$ref` may stand inside itself, and how deep any value is where none is described.
MAX_DEPTH = 3
#: How deep a schema may be nested.
_MAX_NESTING = 64
#: Most values that `multipleOf` may leave.
_MAX_MULTIPLES = 1000
#: Keywords that change nothing about what is valid.
_NOTES = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$schema",
        "$id",
        "id",
        "$anchor",
        "$comment",
        "$defs",
        "definitions",
        "$vocabulary",
        "discriminator",
        "strict",
        "contentMediaType",
        "contentEncoding",
        "name",
    }
)
_BY_PATTERN = "patternProperties"
_OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "additionalItems"),
    "object": (
        "properties", "required", "additionalProperties", "patternProperties", "minProperties",
        "maxProperties",
    ),
}  # fmt: skip
_OF_TYPE["integer"] = _OF_TYPE["number"]
_KNOWN = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}.union(*_OF_TYPE.values())
_FORMATS = {
    "date": r"[1-9][0-9]{3}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|"
    r"(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])\.){3}"
    "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])",
    "email": r"[a-z0-9]{1,16}(?:[._+\-][a-z0-9]{1,16}){0,2}@[a-z0-9]{1,16}(?:\.[a-z0-9]{1,16}){0,2}"
    r"\.[a-z]{2,8}",
    "hostname": r"[a-z0-9]{1,16}(?:-[a-z0-9]{1,16})?(?:\.[a-z0-9]{1,16}){0,3}",
    "uri": r"https?://[a-z0-9]{1,16}(?:\.[a-z0-9]{1,16}){0,3}(?:/[A-Za-z0-9_.\-]{0,32}){0,4}",
}
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    r"(?:Z|[+\-](?:0[0-9]|1[0-3]):[0-5][0-9])"
)
_FORMATS |= {"time": _TIME, "date-time": f"(?:{_FORMATS['date']})T{_TIME}"}


def expression_of(schema: Any, longest: int) -> str:
    """Translate a schema.

    Args:
        schema: any JSON value.
        longest: characters that no answer exceeds; longer bounds of strings and arrays are none.

    Raises:
        InvalidRequest: names the keyword that cannot be held, and its path.
    """
    try:
        found = _Translator(schema, longest).value(schema, "$", 0)
    except InvalidRequest:
        raise
    except RecursionError as error:
        raise _refusal("$", "is nested too deep") from error
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        # A keyword whose value has another type than JSON Schema gives it.
        raise _refusal("$", f"is no well-formed schema: {error}") from error
    if found is None:
        raise _refusal("$", "allows nothing")
    return found


def any_json(depth: int = MAX_DEPTH) -> str:
    """Match any compact JSON value with so many levels of objects and arrays."""
    simple = regex.any_of([regex.STRING, regex.NUMBER, "true", "false", "null"])
    if not depth:
        return simple
    inner = any_json(depth - 1)
    return regex.any_of(
        [simple, _map_of(regex.STRING, inner), rf"\[{regex.listed(inner, 0, None)}\]"]
    )


def any_object(depth: int = MAX_DEPTH) -> str:
    """Match any compact JSON object with so many levels."""
    return _map_of(regex.STRING, any_json(depth - 1))


def _map_of(key: str, value: str) -> str:
    return rf"\{{{regex.listed(f'{key}:{value}', 0, None)}\}}"


def _refusal(path: str, problem: str) -> InvalidRequest:
    return InvalidRequest(FIELD, f"json: {path} {problem}")


class _Translator:
    """Translates the parts of one schema; None stands for "nothing matches"."""

    def __init__(self, root: Any, longest: int) -> None:
        self._root, self._longest = root, longest
        #: `$ref`s that are being translated.
        self._open: list[str] = []
        self._spent = 0

    def value(self, schema: Any, path: str, depth: int) -> str | None:
        """Translate the schema at `path`."""
        if depth > _MAX_NESTING:
            raise _refusal(path, f"is nested more than {_MAX_NESTING} levels deep")
        if schema is True or schema == {}:
            return self._counted(any_json(), path)
        if schema is False:
            return None
        if not isinstance(schema, Mapping):
            raise _refusal(path, "must be an object or a boolean")
        for name in schema:
            if (
                name not in _KNOWN
                and name not in _NOTES
                and not _changes_nothing(name, schema[name])
            ):
                raise _refusal(path, f"has {name}, which cannot be held")
        return self._counted(self._value(schema, path, depth + 1), path)

    def _counted(self, found: str | None, path: str) -> str | None:
        # Copies of copies: a few lines of schema could make gigabytes.
        self._spent += len(found or "")
        if self._spent > 16 * MAX_EXPRESSION or len(found or "") > MAX_EXPRESSION:
            raise _refusal(path, "becomes too large; nest or repeat less")
        return found

    def _value(self, schema: Schema, path: str, depth: int) -> str | None:
        if "$ref" in schema:
            return self._reference(schema, path, depth)
        for name in ("allOf", "anyOf", "oneOf"):
            if name in schema:
                return self._combined(name, schema, path, depth)
        if "enum" in schema or "const" in schema:
            return self._constant(schema, path)
        kinds = schema.get("type")
        if kinds is None:
            kinds = [
                t for t, names in _OF_TYPE.items() if t != "integer" and set(names) & set(schema)
            ]
            if not kinds:
                return any_json()
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not all(kind in TYPES for kind in kinds):
            raise _refusal(path, f"has type {json.dumps(kinds)}; known are {', '.join(TYPES)}")
        found = [self._typed(kind, schema, path, depth) for kind in kinds]
        return self._either(found)

    def _either(self, found: list[str | None]) -> str | None:
        possible = [expression for expression in found if expression is not None]
        return regex.any_of(possible) if possible else None

    def _reference(self, schema: Schema, path: str, depth: int) -> str | None:
        name = schema["$ref"]
        rest = {key: value for key, value in schema.items() if key != "$ref" and key not in _NOTES}
        target = self._resolve(name, path)
        if rest:
            if isinstance(target, Mapping) and not set(rest) & set(target):
                target = {**target, **rest}
            else:
                raise _refusal(path, f"has {min(rest)} beside $ref, which cannot be held")
        if self._open.count(name) > MAX_DEPTH:
            return None
        self._open.append(name)
        try:
            return self.value(target, path, depth)
        finally:
            self._open.pop()

    def _resolve(self, name: Any, path: str) -> Any:
        if not isinstance(name, str) or not name.startswith("#"):
            raise _refusal(
                path, f"has $ref {json.dumps(name)}; only those that begin with # are read"
            )
        target = self._root
        for part in name[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~").replace("%24", "$").replace("%25", "%")
            if isinstance(target, Mapping) and key in target:
                target = target[key]
            elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            else:
                raise _refusal(path, f"has $ref {json.dumps(name)}, which is not there")
        return target

    def _combined(self, name: str, schema: Schema, path: str, depth: int) -> str | None:
        parts = schema[name]
        if not isinstance(parts, list) or not parts:
            raise _refusal(path, f"has {name} that is no list of schemas")
        rest = {key: value for key, value in schema.items() if key != name}
        if name == "allOf":
            merged: Schema | bool = rest
            for i, part in enumerate(parts):
                merged = self._merged(merged, part, f"{path}.allOf[{i}]")
            return self.value(merged, path, depth)
        if name == "oneOf":
            self._check_disjoint([self._followed(part) for part in parts], path)
        asserts = any(key not in _NOTES for key in rest)
        found = []
        for i, part in enumerate(parts):
            place = f"{path}.{name}[{i}]"
            one = self._merged(rest, part, place) if asserts else part
            found.append(self.value(one, place, depth))
        return self._either(found)

    def _followed(self, schema: Any) -> Any:
        for _ in range(_MAX_NESTING):
            if not (isinstance(schema, Mapping) and "$ref" in schema):
                return schema
            schema = self._resolve(schema["$ref"], "$")
        return schema

    def _merged(self, left: Any, right: Any, path: str) -> Any:
        """A schema of what both allow."""
        if isinstance(right, Mapping) and "$ref" in right and not set(right) <= _NOTES | {"$ref"}:
            raise _refusal(path, "has keywords beside $ref, to be merged, which cannot be held")
        right = self._followed(right)
        if right is True or left is False:
            return left
        if right is False or left is True:
            return right
        if not isinstance(right, Mapping):
            raise _refusal(path, "must be an object or a boolean")
        self._check_apart(left, right, path)
        self._check_apart(right, left, path)
        result = dict(left)
        for name, value in right.items():
            if name in _NOTES or name not in result or equal(result[name], value):
                result.setdefault(name, value)
                continue
            try:
                result[name] = self._merged_keyword(name, result[name], value, path)
            except (AttributeError, TypeError) as error:
                raise _refusal(path, f"has {name} with a value of another type") from error
            if name == "type" and not result[name]:
                return False
        return result

    def _merged_keyword(self, name: str, left: Any, right: Any, path: str) -> Any:
        """The value of a keyword that both have, differently."""
        match name:
            case "required":
                return [*left, *(key for key in right if key not in left)]
            case "properties":
                both = {**left}
                for key, inner in right.items():
                    both[key] = self._merged(both[key], inner, path) if key in both else inner
                return both
            case "minimum" | "minLength" | "minItems" | "exclusiveMinimum":
                return max(left, right)
            case "maximum" | "maxLength" | "maxItems" | "exclusiveMaximum":
                return min(left, right)
            case "type":
                kinds, others = ([v] if isinstance(v, str) else v for v in (left, right))
                both_kinds = [
                    k for k in kinds if k in others or (k == "integer" and "number" in others)
                ]
                return both_kinds + [
                    k for k in others if k == "integer" and "number" in kinds and k not in kinds
                ]
        raise _refusal(path, f"has {name} twice, to be merged, which cannot be held")

    def _check_apart(self, one: Schema, other: Schema, path: str) -> None:
        # These keywords hold for what their own neighbours do not name.
        for closing, naming in (
            ("additionalProperties", ("properties", _BY_PATTERN)),
            (_BY_PATTERN, ("properties",)),
            ("items", ("prefixItems",)),
            ("additionalItems", ("items", "prefixItems")),
        ):
            if one.get(closing) in (None, True):
                continue
            for name in naming:
                if name in other and other[name] != one.get(name):
                    problem = f"has {name} to be merged with {closing}, which cannot be held"
                    raise _refusal(path, problem)

    def _check_disjoint(self, parts: list[Any], path: str) -> None:
        for i, one in enumerate(parts):
            for other in parts[:i]:
                if not are_disjoint(one, other):
                    raise _refusal(
                        path, "has oneOf, which cannot be held unless its parts have different "
                        "types or a required property with different constants; use anyOf",
                    )  # fmt: skip

    def _constant(self, schema: Schema, path: str) -> str | None:
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list):
            raise _refusal(path, "has enum that is no list")
        if "enum" in schema and "const" in schema:
            values = [value for value in values if equal(value, schema["const"])]
        kinds = schema.get("type", list(TYPES))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        for name in schema:
            if name not in ("enum", "const", "type") and name not in _NOTES:
                raise _refusal(path, f"has {name} beside enum or const, which cannot be held")
        kept = [value for value in values if any(is_of(value, kind) for kind in kinds)]
        return regex.any_of(regex.json_literal(value) for value in kept) if kept else None

    def _typed(self, kind: str, schema: Schema, path: str, depth: int) -> str | None:
        match kind:
            case "string":
                return self._string(schema, path)
            case "number" | "integer":
                return self._number(schema, path, whole=kind == "integer")
            case "boolean":
                return "(?:true|false)"
            case "null":
                return "null"
            case "array":
                return self._array(schema, path, depth)
            case _:
                return self._object(schema, path, depth)

    def _string(self, schema: Schema, path: str) -> str | None:
        least, most = self._bounds(schema, path, "minLength", "maxLength")
        if most is not None and least > most:
            return None
        if "pattern" in schema:
            if "format" in schema:
                raise _refusal(path, "has pattern beside format, which cannot be held")
            inside, shortest, longest = self._pattern(schema["pattern"], path)
            for name, ok in (
                ("minLength", shortest >= least),
                ("maxLength", most is None or longest <= most),
            ):
                if not ok:
                    problem = (
                        f"has {name} beside a pattern that does not imply it, which cannot be held"
                    )
                    raise _refusal(path, problem)
            return f'"{inside}"'
        if "format" in schema:
            return self._format(schema, path, least, most)
        return f'"{regex.repeated(regex.CHARACTER, least, most)}"'

    def _pattern(self, pattern: Any, path: str) -> tuple[str, int, int]:
        try:
            return inside_json_string(pattern if isinstance(pattern, str) else "(")
        except Unsupported as error:
            raise _refusal(path, f"has a pattern that cannot be held: {error}") from error

    def _format(self, schema: Schema, path: str, least: int, most: int | None) -> str:
        found = _FORMATS.get(schema["format"]) if isinstance(schema["format"], str) else None
        if found is None:
            known = ", ".join(_FORMATS)
            problem = (
                f"has format {json.dumps(schema['format'])}, which cannot be held; known: {known}"
            )
            raise _refusal(path, problem)
        lengths = {"date": (10, 10), "uuid": (36, 36), "time": (9, 21), "date-time": (20, 32)}
        shortest, longest = lengths.get(schema["format"], (1, 512))
        if least > shortest or (most is not None and most < longest):
            name = "minLength" if least > shortest else "maxLength"
            raise _refusal(path, f"has {name} beside format, which cannot be held")
        return f'"{found}"'

    def _number(self, schema: Schema, path: str, *, whole: bool) -> str | None:
        names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
        given: dict[str, Decimal] = {}
        for name in names:
            if (value := schema.get(name)) is not None:
                if (
                    isinstance(value, bool)
                    or not isinstance(value, int | float)
                    or not math.isfinite(value)
                ):
                    raise _refusal(path, f"has {name} {json.dumps(value)}; it must be a number")
                given[name] = Decimal(str(value))
        if not given:
            return regex.INTEGER if whole else regex.NUMBER
        unit = given.pop("multipleOf", None)
        if unit is not None and unit <= 0:
            raise _refusal(path, "has multipleOf that is not above 0")
        digits = 0
        if not whole and unit is None:
            # With a fixed number of decimals a number is a whole one with a point in it.
            digits = max(
                (-int(v.normalize().as_tuple().exponent) for v in given.values()), default=0
            )
            digits = max(2, digits)
            if digits > 9:
                raise _refusal(path, "has bounds with more than 9 decimals, which cannot be held")
        low, high = whole_bounds(given, 10**digits)
        if unit is not None:
            if unit != int(unit):
                problem = f"has multipleOf {unit}, which cannot be held unless it is a whole number"
                raise _refusal(path, problem)
            return self._multiples(int(unit), low, high, path)
        if not digits:
            return regex.integers(low, high)
        return decimals(low, high, digits)

    def _multiples(self, unit: int, low: int | None, high: int | None, path: str) -> str | None:
        if unit == 1:
            return regex.integers(low, high)
        if (
            low is None
            and high is None
            and set(str(unit)) <= {"0", "1"}
            and str(unit).count("1") == 1
        ):
            zeros = "0" * (len(str(unit)) - 1)
            return f"(?:0|-?[1-9][0-9]{{0,9}}{zeros})"
        low = -unit * (_MAX_MULTIPLES // 2) if low is None else low
        high = low + unit * (_MAX_MULTIPLES - 1) if high is None else high
        first, last = -(-low // unit) * unit, high // unit * unit
        if last < first:
            return None
        if (last - first) // unit >= _MAX_MULTIPLES:
            problem = f"has multipleOf {unit}, which leaves more than {_MAX_MULTIPLES} values"
            raise _refusal(path, problem)
        return regex.any_of(regex.literal(str(v)) for v in range(first, last + 1, unit))

    def _array(self, schema: Schema, path: str, depth: int) -> str | None:
        least, most = self._bounds(schema, path, "minItems", "maxItems")
        prefix, items = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(items, list):  # before draft 2020-12
            prefix, items = items, schema.get("additionalItems", True)
        elif "additionalItems" in schema and prefix:
            raise _refusal(path, "has additionalItems beside prefixItems")
        if not isinstance(prefix, list):
            raise _refusal(path, "has prefixItems that is no list")
        if schema.get("uniqueItems") and (most is None or most > 1):
            raise _refusal(path, "has uniqueItems, which cannot be held for more than one item")
        first = [
            self.value(part, f"{path}.prefixItems[{i}]", depth) for i, part in enumerate(prefix)
        ]
        if None in first:
            first = first[: first.index(None)]
            most = len(first) if most is None else min(most, len(first))
        if most is not None and most <= len(first):
            first, item = first[:most], None
        else:
            item = self.value(items, f"{path}.items", depth)
        if item is None:
            most = len(first)
        if most is not None and least > most:
            return None
        if not first:
            return rf"\[{regex.listed(item or '', least, most)}\]"
        # All of the described items, and then others.
        more = ""
        if item is not None:
            rest = None if most is None else most - len(first)
            more = regex.repeated(f",{item}", max(0, least - len(first)), rest)
        return rf"\[{','.join(str(part) for part in first)}{more}\]"

    def _object(self, schema: Schema, path: str, depth: int) -> str | None:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        other = schema.get("additionalProperties", True)
        patterns = schema.get("patternProperties", {})
        if not isinstance(properties, Mapping) or not isinstance(patterns, Mapping):
            raise _refusal(path, "has properties that are no object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _refusal(path, "has required that is no list of names")
        described: dict[str, Any] = dict(properties)
        for name in required:
            described.setdefault(name, other)
        for name in described:
            matching = []
            for pattern, inner in patterns.items():
                self._pattern(pattern, path)
                if re.search(pattern, name):
                    matching.append(inner)
            if matching and name not in properties:
                described[name] = matching.pop(0)
            for inner in matching:
                described[name] = self._merged(described[name], inner, path)
        least, most = self._bounds(schema, path, "minProperties", "maxProperties")
        if not described:
            return self._map(schema, path, depth, least, most)
        members = []
        for name, inner in described.items():
            found = self.value(inner, f"{path}.{name}", depth)
            if found is not None:
                members.append((f"{regex.json_literal(name)}:{found}", name in required))
            elif name in required:
                return None
        num_required = sum(needed for _, needed in members)
        if least > num_required or (most is not None and most < len(members)):
            name = "minProperties" if least > num_required else "maxProperties"
            raise _refusal(path, f"has {name}, which cannot be held beside optional properties")
        return rf"\{{{_members(members)}\}}"

    def _map(
        self, schema: Schema, path: str, depth: int, least: int, most: int | None
    ) -> str | None:
        """An object whose keys the schema does not name."""
        other, patterns = (
            schema.get("additionalProperties", True),
            schema.get("patternProperties", {}),
        )
        key, inner = regex.STRING, other
        if len(patterns) > 1:
            raise _refusal(path, "has several patternProperties, which cannot be held")
        for pattern, value in patterns.items():
            key, inner = f'"{self._pattern(pattern, path)[0]}"', value
        if least > 1:  # two equal keys are one
            raise _refusal(path, "has minProperties above 1, which cannot be held")
        if most == 0:
            return r"\{\}"
        depth_left = inner is True or inner == {}
        found = any_json(MAX_DEPTH - 1) if depth_left else self.value(inner, f"{path}.*", depth)
        if found is None:
            return r"\{\}" if not least else None
        return rf"\{{{regex.listed(f'{key}:{found}', least, most)}\}}"

    def _bounds(self, schema: Schema, path: str, low: str, high: str) -> tuple[int, int | None]:
        for name in (low, high):
            value = schema.get(name, 0)
            ok = (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and value == int(value)
            )
            if not ok or value < 0:
                raise _refusal(path, f"has {name} {json.dumps(value)}; it must be a whole number")
        least, most = int(schema.get(low, 0)), schema.get(high)
        if least > self._longest:
            raise _refusal(path, f"has {low} {least}; no answer here has more than {self._longest}")
        return least, None if most is None or most > self._longest else int(most)


def _members(members: list[tuple[str, bool]]) -> str:
    """Members of an object in their order; those that are not required may be missing."""
    behind = [
        "".join(f",{m}" if n else f"(?:,{m})?" for m, n in members[i + 1 :])
        for i in range(len(members))
    ]
    found = ""
    for (member, needed), tail in zip(reversed(members), reversed(behind), strict=True):
        found = f"{member}{tail}" if needed else f"(?:{member}{tail}|{found})"
    return found


def _changes_nothing(name: str, value: Any) -> bool:
    return (name == "nullable" and value is False) or (name.startswith("x-"))
