"""Answer every question of a CSV file, and write the answers beside them.

    python examples/batch_csv.py questions.csv answers.csv --url http://localhost:8000

The file needs a column `question`. The answers are jobs: they go on if this program dies.
"""

import argparse
import csv
from pathlib import Path

from dllm_client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer the questions of a CSV file.")
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--url", default="http://localhost:8000")
    options = parser.parse_args()
    with options.questions.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with Client(options.url) as client:
        texts = client.generate_batch([row["question"] for row in rows], gen_length=32)
    with options.answers.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "answer"])
        writer.writeheader()
        writer.writerows({**row, "answer": text} for row, text in zip(rows, texts, strict=True))


if __name__ == "__main__":
    main()
