"""Prompts as users give them on a command line."""

import json
import sys
from typing import Annotated, Any

import typer

from dllm_client._errors import BadRequestError
from dllm_client._types import Prompt

PromptText = Annotated[str, typer.Argument(help="The prompt; - reads standard input.")]
Messages = Annotated[
    bool, typer.Option("--messages", help="The prompt is a JSON list of chat messages.")
]


def read_prompt(prompt: str, messages: bool) -> Prompt:
    """The prompt as the client takes it; raises BadRequestError for messages that are none."""
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not messages:
        return text
    try:
        parsed: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"messages: {error}", 400, "messages") from error
    if not isinstance(parsed, list) or not all(isinstance(one, dict) for one in parsed):
        raise BadRequestError("messages: must be a JSON list of objects", 400, "messages")
    return parsed
