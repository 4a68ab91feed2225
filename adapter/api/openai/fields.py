"""What OpenAI's calls accept without honouring it.

A parameter that would change the answer and cannot be honoured is an error that names it, unless
its value means "off". A parameter that changes nothing is accepted with any value, and null is
accepted even under an unknown name.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from adapter.api.schemas import Body

#: Values of supported parameters that mean the same as leaving them out.
OFF: Mapping[str, Sequence[object]] = {
    "top_k": (0, -1),
    "suffix": ("",),
    "stop": ("",),
    "max_tokens": (-1,),
    "max_completion_tokens": (-1,),
    "priority": (0,),
}

NoEffect = Annotated[Any, Field(description="has no effect")]


def _is_one_of(value: object, values: Sequence[object]) -> bool:
    """Whether it equals one of them; 0 and False are different values."""
    return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in values)


class Unsupported:
    """Marks an unsupported parameter: only null and the given values, which mean "off", pass."""

    def __init__(self, *values: object) -> None:
        self._values = (None, *values)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Check the value before any conversion."""
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, _core: CoreSchema, _handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Describe the parameter by its permitted values."""
        return {"enum": list(self._values)}

    def _check(self, value: object) -> None:
        if not _is_one_of(value, self._values):
            shown = " or ".join("null" if off is None else repr(off) for off in self._values)
            raise PydanticCustomError(
                "not_supported", "This is not supported; leave it out or send {off}", {"off": shown}
            )


class OpenAIBody(Body):
    """A body, or a part of one, in which null and the values of `OFF` count as left out."""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {
            name: item
            for name, item in value.items()
            if item is not None and not _is_one_of(item, OFF.get(name, ()))
        }


class Extensions(OpenAIBody):
    """Parameters that vLLM's and SGLang's clients add to OpenAI's, and that are not supported."""

    min_p: Annotated[Any, Unsupported(0)] = None
    repetition_penalty: Annotated[Any, Unsupported(1)] = None
    length_penalty: Annotated[Any, Unsupported(1)] = None
    use_beam_search: Annotated[Any, Unsupported(False)] = None
    min_tokens: Annotated[Any, Unsupported(0)] = None
    stop_token_ids: Annotated[Any, Unsupported([])] = None
    allowed_token_ids: Annotated[Any, Unsupported([])] = None
    bad_words: Annotated[Any, Unsupported([])] = None
    logits_processors: Annotated[Any, Unsupported([])] = None
    include_stop_str_in_output: Annotated[Any, Unsupported(False)] = None
    no_stop_trim: Annotated[Any, Unsupported(False)] = None
    skip_special_tokens: Annotated[Any, Unsupported(True)] = None
    add_special_tokens: Annotated[Any, Unsupported(False)] = None
    add_generation_prompt: Annotated[Any, Unsupported(True)] = None
    continue_final_message: Annotated[Any, Unsupported(False)] = None
    return_token_ids: Annotated[Any, Unsupported(False)] = None
    return_tokens_as_token_ids: Annotated[Any, Unsupported(False)] = None
    return_hidden_states: Annotated[Any, Unsupported(False)] = None
    chat_template_kwargs: Annotated[Any, Unsupported({}, {"enable_thinking": False})] = None
    mm_processor_kwargs: Annotated[Any, Unsupported({})] = None
    documents: Annotated[Any, Unsupported([])] = None
    spaces_between_special_tokens: NoEffect = None
    separate_reasoning: NoEffect = None
    stream_reasoning: NoEffect = None
    include_reasoning: NoEffect = None
    cache_salt: NoEffect = None
    request_id: NoEffect = None
    rid: NoEffect = None
