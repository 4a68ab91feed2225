"""LangChain's own calls for tools and structured output; prints what it reads as JSON.

python langchain_tools.py http://localhost:8000
"""

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION = "What is 17 + 25?"


class Add(BaseModel):
    """Adds two numbers."""

    exact: bool
    unit: bool


chat = ChatOpenAI(
    model="dllm", base_url=f"{sys.argv[1]}/v1", api_key="-", max_completion_tokens=64, max_retries=0
)
bound = chat.bind_tools([Add], tool_choice="required")
message = bound.invoke(QUESTION)
pieces = list(bound.stream(QUESTION))
streamed = pieces[0]
for piece in pieces[1:]:
    streamed += piece
result = ToolMessage("42", tool_call_id=message.tool_calls[0]["id"])
after = chat.bind_tools([Add]).invoke([HumanMessage(QUESTION), message, result])
structured = [
    chat.with_structured_output(Add, method=method).invoke(QUESTION)
    for method in ("function_calling", "json_schema")
]
found = {
    "whole": [(call["name"], call["args"]) for call in message.tool_calls],
    "streamed": [(call["name"], call["args"]) for call in streamed.tool_calls],
    "reason": message.response_metadata["finish_reason"],
    "after": after.response_metadata["finish_reason"],
    "structured": [one.model_dump() for one in structured],
}
print(json.dumps(found))
