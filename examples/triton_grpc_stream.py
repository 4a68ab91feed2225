"""Watch a text being denoised, step by step, over Triton's gRPC stream.

python examples/triton_grpc_stream.py --url localhost:8011 "Tell me about AI"
"""

import argparse

from dllm_client.triton import Event, TritonClient


def describe(event: Event) -> str:
    """How far the canvas is, how sure the engine was, and the text that stands so far."""
    committed = event.confidence[event.confidence >= 0]
    mean = f"{committed.mean():.2f}" if committed.size else "-"
    progress = f"{committed.size:4d}/{event.confidence.size} tokens, confidence {mean}"
    return f"step {event.usage.steps:4d}  {progress}  {event.text!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description="One event per denoising step.")
    parser.add_argument("prompt", nargs="?", default="Tell me about AI")
    parser.add_argument("--url", default="localhost:8011", help="Triton's gRPC port, host:port")
    parser.add_argument("--gen-length", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    messages = [{"role": "user", "content": options.prompt}]
    with TritonClient(grpc_url=options.url) as client:
        events = client.stream(messages, gen_length=options.gen_length, seed=options.seed)
        for event in events:
            print(describe(event))
    print(f"finished: {event.finish_reason}, seed {event.seed}")


if __name__ == "__main__":
    main()
