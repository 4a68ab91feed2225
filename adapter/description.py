"""The published description of the API, with the limits of this very server in it."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from adapter.settings import Settings

#: Components of the description that are bodies of requests.
BODIES = ("GenerateRequest", "BatchRequest", "CompletionCall", "ChatCall")

Schema = dict[str, Any]


def describe_limits(app: FastAPI, settings: Settings) -> None:
    """Have `/openapi.json` and `/docs` name what `check_limits` will hold requests to."""
    describe = app.openapi

    def described() -> Schema:
        is_new = app.openapi_schema is None
        description = describe()
        if is_new:
            schemas = description["components"]["schemas"]
            for body in BODIES:
                _limit(schemas[body]["properties"], _limits(settings))
        return description

    app.openapi = described  # type: ignore[method-assign]


def _limits(settings: Settings) -> Mapping[str, Schema]:
    """What each field is limited by, in the words of JSON Schema, by its type."""
    text = {"string": {"maxLength": settings.max_prompt_chars}}
    canvas = {"integer": {"maximum": settings.max_gen_length}}
    return {
        "prompt": text,
        "suffix": text,
        "prompts": {"array": {"maxItems": settings.max_batch_size}},
        "input_ids": {"array": {"maxItems": settings.max_prompt_chars}},
        "canvas_ids": {"array": {"maxItems": settings.max_gen_length}},
        "gen_length": canvas,
        "max_tokens": canvas,
        "max_completion_tokens": canvas,
        "block_length": canvas,
        "temperature": {"number": {"maximum": settings.max_temperature}},
        "timeout": {"number": {"maximum": settings.max_timeout}},
        "model": {"string": {"const": settings.openai_model}},
    }


def _limit(properties: Mapping[str, Schema], limits: Mapping[str, Schema]) -> None:
    for name in properties.keys() & limits.keys():
        field = properties[name]
        for variant in field.get("anyOf") or field.get("oneOf") or [field]:
            variant.update(limits[name].get(variant.get("type"), {}))
