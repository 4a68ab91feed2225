"""Fill a gap between two given texts, which models that write from left to right cannot do.

    python examples/infilling.py --url http://localhost:8000

Needs `pip install openai`. LLaDA and Dream fill gaps; block-wise models refuse `suffix`.
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill the gap between two texts.")
    parser.add_argument("before", nargs="?", default="The capital of France")
    parser.add_argument("after", nargs="?", default="Paris.")
    parser.add_argument("--url", default="http://localhost:8000")
    options = parser.parse_args()
    client = OpenAI(base_url=f"{options.url}/v1", api_key="-")
    answer = client.completions.create(
        model="dllm", prompt=options.before, suffix=options.after, max_tokens=8
    )
    print(options.before, f"[{answer.choices[0].text}]", options.after)


if __name__ == "__main__":
    main()
