"""Chat through OpenAI's client, with the history that a second turn needs.

    python examples/chat_openai.py --url http://localhost:8000

Needs `pip install openai`.
"""

import argparse
from typing import Any

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Two turns of a chat.")
    parser.add_argument("--url", default="http://localhost:8000")
    options = parser.parse_args()
    client = OpenAI(base_url=f"{options.url}/v1", api_key="-")
    history: list[Any] = []
    for question in ("What is 17 + 25?", "What is the capital of France?"):
        history.append({"role": "user", "content": question})
        stream = client.chat.completions.create(
            model="dllm",
            messages=history,
            stream=True,
            # Fields of diffusion models go here.
            extra_body={"confidence_threshold": 0.9},
        )
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        print(f"{question}\n  {answer}")
        history.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
