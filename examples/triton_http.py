"""Ask Triton directly over HTTP, as any tritonclient user would.

    python examples/triton_http.py --url localhost:8010 "What is 17 + 25?"

The model `dllm_unary` gives one answer per `infer` call. Every input is a tensor of shape [1, n].
`dllm_client.triton.TritonClient.generate` wraps these lines.
"""

import argparse
import json
from typing import Any

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray


def tensor(name: str, datatype: str, values: NDArray[Any]) -> triton.InferInput:
    """An input of shape [1, n]."""
    item = triton.InferInput(name, [1, values.size], datatype)
    item.set_data_from_numpy(values.reshape(1, -1))
    return item


def main() -> None:
    parser = argparse.ArgumentParser(description="One infer() call.")
    parser.add_argument("prompt", nargs="?", default="What is 17 + 25?")
    parser.add_argument("--url", default="localhost:8010", help="Triton's HTTP port, host:port")
    options = parser.parse_args()

    # `messages` goes through the checkpoint's chat template; `text_input` would go as it is.
    messages = json.dumps([{"role": "user", "content": options.prompt}])
    inputs = [
        tensor("messages", "BYTES", np.array([messages], dtype=np.object_)),
        tensor("gen_length", "INT64", np.array([32], dtype=np.int64)),
        tensor("temperature", "FP32", np.array([0.0], dtype=np.float32)),
    ]
    with triton.InferenceServerClient(options.url) as client:
        result = client.infer("dllm_unary", inputs)
    prompt_tokens, completion_tokens, steps, passes, *_ = result.as_numpy("usage").reshape(-1)
    print(result.as_numpy("text_output").reshape(-1)[0].decode())
    print(f"{prompt_tokens} + {completion_tokens} tokens, {steps} steps, {passes} forward passes")


if __name__ == "__main__":
    main()
