"""Checks requests against the settings' limits; errors have FastAPI's format."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError

from adapter.api.schemas import BatchRequest, GenerateRequest
from adapter.settings import Settings

Problem = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BatchLimit:
    """The most prompts that a call may ever have, and the settings that say so."""

    most: int
    settings: str


def check_limits(body: GenerateRequest, settings: Settings) -> None:
    """Raise `RequestValidationError` with every field that exceeds its limit, and the limit."""
    if problems := [*_prompt_problems(body, settings), *_option_problems(body, settings)]:
        raise RequestValidationError(problems)


def check_batch(body: BatchRequest, limit: BatchLimit, settings: Settings) -> None:
    """Do the same for a batch."""
    problems = list(_too_many("prompts", body.prompts, limit))
    for index, prompt in enumerate(body.prompts[: limit.most]):
        problems += _too_long(("prompts", index), prompt, settings.max_prompt_chars)
    if problems := [*problems, *_option_problems(body, settings)]:
        raise RequestValidationError(problems)


def check_options(body: GenerateRequest, settings: Settings) -> None:
    """Do the same for all but the prompt, which only the model's context limits."""
    if problems := list(_option_problems(body, settings)):
        raise RequestValidationError(problems)


def check_one_choice(body: GenerateRequest) -> None:
    """Raise `RequestValidationError` if a call that streams one text asks for several."""
    if problems := list(_too_large("n", body.n, 1)):
        raise RequestValidationError(problems)


def check_batch_size(field: str, items: Sequence[Any], limit: BatchLimit) -> None:
    """Raise `RequestValidationError` if a call has too many prompts, which it names `field`."""
    if problems := list(_too_many(field, items, limit)):
        raise RequestValidationError(problems)


def _option_problems(body: GenerateRequest | BatchRequest, settings: Settings) -> Iterator[Problem]:
    yield from _too_large("temperature", body.temperature, settings.max_temperature)
    yield from _too_large("gen_length", body.gen_length, settings.max_gen_length)
    if isinstance(body, GenerateRequest):
        yield from _too_large("n", body.n, settings.max_choices)
    if body.timeout is not None:
        yield from _too_large("timeout", body.timeout, settings.max_timeout)
    if body.block_length is not None:
        yield from _too_large("block_length", body.block_length, body.canvas_length)


def _prompt_problems(body: GenerateRequest, settings: Settings) -> Iterator[Problem]:
    limit = settings.max_prompt_chars
    if body.prompt is not None:
        yield from _too_long("prompt", body.prompt, limit)
    if body.suffix is not None:
        yield from _too_long("suffix", body.suffix, limit)
    if body.input_ids is not None:
        yield from _too_long("input_ids", body.input_ids, limit, "List", "items")
    if body.messages is not None:
        content = "".join(message.content for message in body.messages)
        yield from _too_long("messages", content, limit, "All messages together", "characters")
        # An empty message costs tokens too.
        yield from _too_long("messages", body.messages, limit, "List", "items")
    canvas = body.canvas_ids or []
    yield from _too_long("canvas_ids", canvas, settings.max_gen_length, "List", "items")


def _too_many(field: str, items: Sequence[Any], limit: BatchLimit) -> Iterator[Problem]:
    unit = f"items ({limit.settings})"
    yield from _too_long(field, items, limit.most, "List", unit)


def _too_long(
    field: str | tuple[str | int, ...],
    value: Sequence[Any],
    limit: int,
    what: str = "String",
    unit: str = "characters",
) -> Iterator[Problem]:
    if len(value) > limit:
        message = f"{what} should have at most {limit} {unit}, not {len(value)}"
        # A client can split what it sends by this number.
        yield {**_problem("too_long", field, message), "ctx": {"max_length": limit}}


def _too_large(field: str, value: float, limit: float) -> Iterator[Problem]:
    if value > limit:
        message = f"Input should be less than or equal to {limit:g}"
        yield _problem("less_than_equal", field, message)


def _problem(kind: str, field: str | tuple[str | int, ...], message: str) -> Problem:
    path = (field,) if isinstance(field, str) else field
    return {"type": kind, "loc": ("body", *path), "msg": message}
