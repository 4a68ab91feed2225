"""Runs lm-evaluation-harness on the sums beside this file.

Arguments: the kind of model, its arguments as for `lm_eval --model_args`, and a folder for the
task. Prints the share of right answers.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

MODEL, MODEL_ARGS, FOLDER = sys.argv[1:]
SUMS = [("What is 17 + 25?", "42"), ("What is 40 + 21?", "61")]

folder = Path(FOLDER)
data = folder / "sums.jsonl"
data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in SUMS))
task = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": str(data), "cache_dir": str(folder)},
    "test_split": "train",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 32},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
results = lm_eval.simple_evaluate(
    model=MODEL,
    model_args=MODEL_ARGS,
    tasks=[task],
    task_manager=TaskManager(include_defaults=False),
    apply_chat_template=MODEL == "local-chat-completions",
    bootstrap_iters=0,
)
print(json.dumps(results["results"]["sums"]["exact_match,none"]))
