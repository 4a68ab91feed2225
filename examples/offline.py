"""Answer questions without any server.

    python examples/offline.py model_repository/dllm/1/demo_checkpoint "What is 17 + 25?"

`pip install 'dllm-serve[engine]'` is enough for it.
"""

import argparse

from dllm_engine import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate texts in this process.")
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("prompts", nargs="*", default=["What is 17 + 25?"])
    options = parser.parse_args()
    params = SamplingParams(gen_length=32, cache="dual", confidence_threshold=0.9)
    answers = LLM(options.model).generate(options.prompts, params, chat=True)
    for prompt, answer in zip(options.prompts, answers, strict=True):
        print(f"{prompt} {answer.text} ({answer.usage.forward_passes} forward passes)")


if __name__ == "__main__":
    main()
