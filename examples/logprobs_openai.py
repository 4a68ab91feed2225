"""Print how probable each token of a chat was, and the step that committed it.

python examples/logprobs_openai.py [--url http://localhost:8000]
"""

import argparse
import math

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://localhost:8000")
client = OpenAI(base_url=f"{parser.parse_args().url}/v1", api_key="-")

answer = client.chat.completions.create(
    model="dllm",
    messages=[{"role": "user", "content": "What is 17 + 25?"}],
    max_completion_tokens=16,
    logprobs=True,
    top_logprobs=2,
    extra_body={"reveal_steps": True},
)
choice = answer.choices[0]
print(choice.message.content)
content = choice.logprobs.content if choice.logprobs else None
steps = (choice.model_extra or {})["reveal_steps"]
for token, step in zip(content or [], steps, strict=True):
    others = ", ".join(f"{o.token!r} {math.exp(o.logprob):.1%}" for o in token.top_logprobs)
    print(
        f"step {step:2}: {token.token!r} {math.exp(token.logprob):.1%}  (most probable: {others})"
    )
