"""The published description of the API: what the framework cannot know of it."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from adapter.api.canvas_events import Done, Failed, Step
from adapter.api.openai.responses import ChatChunk
from adapter.settings import Settings

#: Components of the description that are bodies of requests.
BODIES = ("GenerateRequest", "BatchRequest", "CompletionCall", "ChatCall")
#: What events of streams hold; of the other bodies the framework knows.
STREAMED: tuple[type[BaseModel], ...] = (Step, Done, Failed, ChatChunk)
COMPONENT = "#/components/schemas/{model}"

Schema = dict[str, Any]


def stream_of(*models: str, events: tuple[str, ...] = (), other: tuple[str, ...] = ()) -> Schema:
    """A content of server-sent events, each with the JSON of one of these components.

    Args:
        models: names of the components.
        events: what the events are called.
        other: data that is no JSON.
    """
    bodies = {"oneOf": [{"$ref": COMPONENT.format(model=model)} for model in models]}
    data: Schema = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": bodies,
    }
    item: Schema = {"type": "object", "required": ["data"]}
    item["properties"] = {"data": {"anyOf": [{"enum": list(other)}, data]} if other else data}
    if events:
        item["properties"]["event"] = {"enum": list(events)}
        item["required"].append("event")
    return {"text/event-stream": {"itemSchema": item}}


def complete_description(app: FastAPI, settings: Settings) -> None:
    """Have `/openapi.json` and `/docs` name what `check_limits` will hold requests to, and what
    streams bring."""
    describe = app.openapi

    def described() -> Schema:
        is_new = app.openapi_schema is None
        description = describe()
        if is_new:
            schemas = description["components"]["schemas"]
            for body in BODIES:
                _limit(schemas[body]["properties"], _limits(settings))
            for name, schema in _streamed().items():
                schemas.setdefault(name, schema)
        return description

    app.openapi = described  # type: ignore[method-assign]


def _streamed() -> Mapping[str, Schema]:
    _, schemas = models_json_schema(
        [(model, "serialization") for model in STREAMED], ref_template=COMPONENT
    )
    definitions: Mapping[str, Schema] = schemas["$defs"]
    return definitions


def _limits(settings: Settings) -> Mapping[str, Schema]:
    """What each field is limited by, in the words of JSON Schema, by its type."""
    text = {"string": {"maxLength": settings.max_prompt_chars}}
    canvas = {"integer": {"maximum": settings.max_gen_length}}
    return {
        "prompt": text,
        "suffix": text,
        "prompts": {
            "array": {
                "maxItems": settings.max_batch_size,
                "items": {"type": "string", "minLength": 1, **text["string"]},
            }
        },
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
