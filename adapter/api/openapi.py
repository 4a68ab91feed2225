"""Additions to the OpenAPI document: limits, keys, examples, and events of streams."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from adapter.api.canvas_events import Done, Failed, Step
from adapter.api.openai.response_objects import ResponseEvent
from adapter.api.openai.responses import ChatChunk
from adapter.auth.middleware import API, METRICS, OPEN
from adapter.settings import Settings

#: Names of the models that are bodies of requests, and of those that OpenAI's calls have.
BODIES = ("GenerateRequest", "BatchRequest")
OPENAI_BODIES = ("CompletionCall", "ChatCall", "ResponseCall")
#: Models in events of streams, which FastAPI does not find by itself.
STREAMED: tuple[type[BaseModel], ...] = (Step, Done, Failed, ChatChunk, ResponseEvent)
#: Ways to send a key; each suffices.
SECURITY_SCHEMES = {
    "Bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
#: A body for each call that has one; /docs offers it.
EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "/v1/generate": {"prompt": "Tell me about AI", "temperature": 0.6, "gen_length": 128},
    "/v1/generate_batch": {
        "prompts": ["What is AI?", "Explain ML."],
        "temperature": 0.0,
        "gen_length": 64,
    },
    "/v1/generate/stream": {"prompt": "What is the capital of France?", "gen_length": 32},
    "/v1/completions": {"prompt": "The capital of France is", "max_tokens": 32},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "What is 17 + 25?"}],
        "max_tokens": 32,
    },
    "/v1/responses": {"input": "What is 17 + 25?", "max_output_tokens": 32},
    "/v1/decisions": {
        "input": "The parcel came two weeks late and was broken.",
        "questions": [{"type": "predicate", "instructions": "Is this a complaint?"}],
    },
    "/v1/score": {"pairs": [["What is 17 + 25?", "42"], ["What is 17 + 25?", "41"]]},
}
#: A value for each parameter of a path; the first job has the id 0.
PATH_EXAMPLES: Mapping[str, Any] = {"request_id": 0}
COMPONENT = "#/components/schemas/{model}"

Schema = dict[str, Any]


def stream_of(*models: str, events: tuple[str, ...] = (), other: tuple[str, ...] = ()) -> Schema:
    """Describe a stream of server-sent events whose data is JSON of one of the models.

    Args:
        models: names of the models.
        events: names of the events.
        other: data besides JSON.
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


def extend_openapi(app: FastAPI, settings: Settings) -> None:
    """Add the limits that `check_limits` enforces, keys, examples, and the events of streams."""
    describe = app.openapi

    def described() -> Schema:
        is_new = app.openapi_schema is None
        description = describe()
        if is_new:
            schemas = description["components"]["schemas"]
            for body in BODIES:
                _limit(schemas[body]["properties"], _limits(settings))
            for body in OPENAI_BODIES:
                _limit(schemas[body]["properties"], _option_limits(settings))
            for name, schema in _streamed().items():
                schemas.setdefault(name, schema)
            description["components"]["securitySchemes"] = SECURITY_SCHEMES
            for path, calls in description["paths"].items():
                for call in calls.values():
                    if _needs_key(path, settings):
                        call["security"] = [{name: []} for name in SECURITY_SCHEMES]
                    _add_examples(call, path, settings)
        return description

    app.openapi = described  # type: ignore[method-assign]


def _needs_key(path: str, settings: Settings) -> bool:
    if not settings.api_keys and settings.api_keys_file is None:
        return False
    if path == METRICS:
        return settings.metrics_need_key
    return path.startswith(API) and path not in OPEN


def _add_examples(call: Schema, path: str, settings: Settings) -> None:
    if path in EXAMPLES and "requestBody" in call:
        example = dict(EXAMPLES[path])
        if not path.startswith("/v1/generate"):  # OpenAI's calls name a model
            example = {"model": settings.openai_model, **example}
        call["requestBody"]["content"]["application/json"]["example"] = example
    values = {**PATH_EXAMPLES, "model": settings.openai_model}
    for parameter in call.get("parameters", ()):
        if parameter["in"] == "path":
            parameter["example"] = values[parameter["name"]]


def _streamed() -> Mapping[str, Schema]:
    _, schemas = models_json_schema(
        [(model, "serialization") for model in STREAMED], ref_template=COMPONENT
    )
    definitions: Mapping[str, Schema] = schemas["$defs"]
    return definitions


def _limits(settings: Settings) -> Mapping[str, Schema]:
    """JSON Schema of each field's limit, by the field's type."""
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
        "block_length": canvas,
        **_option_limits(settings),
    }


def _option_limits(settings: Settings) -> Mapping[str, Schema]:
    """The same of what OpenAI's calls have; they shorten a length instead of refusing it."""
    return {
        "temperature": {"number": {"maximum": settings.max_temperature}},
        "timeout": {"number": {"maximum": settings.max_timeout}},
        "model": {"string": {"const": settings.openai_model}},
    }


def _limit(properties: Mapping[str, Schema], limits: Mapping[str, Schema]) -> None:
    for name in properties.keys() & limits.keys():
        field = properties[name]
        for variant in field.get("anyOf") or field.get("oneOf") or [field]:
            variant.update(limits[name].get(variant.get("type"), {}))
