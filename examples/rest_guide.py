"""Generate a text over plain HTTP: submit, then poll until the job is finished.

    python examples/rest_guide.py --url http://localhost:8000 "Tell me about AI"

Needs `requests` and nothing of ours: any HTTP client can do the same. `dllm_client.Client` does
it with long polling, retries and typed errors.
"""

import argparse
import time

import requests


def generate_text(url: str, prompt: str) -> str:
    """The generated text; raises requests.HTTPError when refused, RuntimeError when it fails."""
    response = requests.post(
        f"{url}/v1/generate",
        json={"prompt": prompt, "temperature": 0.6, "gen_length": 128},
        timeout=30,
    )
    response.raise_for_status()
    request_id = response.json()["request_ids"][0]
    print(f"job {request_id} is submitted")
    while True:
        response = requests.get(f"{url}/v1/result/{request_id}", timeout=30)
        response.raise_for_status()
        job = response.json()
        if job["status"] == "finished":
            text: str = job["text"]
            return text
        if job["status"] != "running":
            raise RuntimeError(f"job {request_id} is {job['status']}: {job.get('error')}")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate a text through the REST API.")
    parser.add_argument("prompt", nargs="?", default="Tell me about machine learning")
    parser.add_argument("--url", default="http://localhost:8000")
    options = parser.parse_args()
    print(generate_text(options.url, options.prompt))


if __name__ == "__main__":
    main()
