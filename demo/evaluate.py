"""Scores a checkpoint by exact match per task: `python -m demo.evaluate DIR`.

It decodes by the plain reference: one forward pass over the whole canvas per committed token,
low-confidence remasking, greedy. You can compare a server's answers with it. SDAR's blocks are
those of its config, and each pass runs over everything up to the end of the block.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from demo import corpus
from demo.chat import Family
from demo.corpus import Example
from demo.model_format import load


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint and the ids for decoding."""

    family: Family
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    mask: int
    #: What ends an answer.
    ends: tuple[int, ...]
    #: Length of SDAR's blocks; 0: attention is full.
    block: int = 0


@dataclass(frozen=True, slots=True)
class Decoding:
    """Decoding parameters; without a `threshold` each step commits a fixed number."""

    length: int = 64
    block: int = 32
    steps: int = 64
    threshold: float | None = None


def open_checkpoint(path: Path) -> Checkpoint:
    """Load weights and tokenizer without remote code."""
    family, model, config = load(path)
    if family == "dream":
        tokenizer = Qwen2Tokenizer.from_pretrained(path)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    stored = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    ends = stored["eos_token_id"]
    ends = tuple(ends) if isinstance(ends, list) else (ends,)
    block = config["block_size"] if family == "sdar" else 0
    return Checkpoint(family, model, tokenizer, config["mask_token_id"], ends, block)


def encode(checkpoint: Checkpoint, question: str) -> list[int]:
    """Ids of one user message in the checkpoint's own chat format."""
    text = checkpoint.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = checkpoint.tokenizer.encode(text, add_special_tokens=False)
    return ids


@torch.no_grad()
def decode(checkpoint: Checkpoint, prompts: list[list[int]], how: Decoding) -> torch.Tensor:
    """Answer prompts of one length; returns ids [rows, how.length]."""
    start = len(prompts[0])
    stop = start + how.length
    # SDAR also denoises what is left of the last block.
    width = -(-stop // checkpoint.block) * checkpoint.block if checkpoint.block else stop
    x = torch.full((len(prompts), width), checkpoint.mask)
    x[:, :start] = torch.tensor(prompts)
    if checkpoint.block:
        return _decode_by_blocks(checkpoint, x, start, how.threshold)[:, start:stop]
    blocks = how.length // how.block
    for block in range(blocks):
        end = start + (block + 1) * how.block
        schedule = _schedule(how.block, how.steps // blocks)
        while bool((x[:, :end] == checkpoint.mask).any()):
            _commit(checkpoint, x, end, next(schedule, 1), how.threshold)
    return x[:, start:]


def _decode_by_blocks(
    checkpoint: Checkpoint, x: torch.Tensor, start: int, threshold: float | None
) -> torch.Tensor:
    """SDAR's loop: blocks are counted from the prompt's start, an end stops after its block."""
    ends = torch.tensor(checkpoint.ends)
    for first in range(start // checkpoint.block * checkpoint.block, x.shape[1], checkpoint.block):
        end = first + checkpoint.block
        while bool((x[:, :end] == checkpoint.mask).any()):
            _commit(checkpoint, x, end, 1, threshold)
        if bool(torch.isin(x[:, start:end], ends).any(1).all()):
            x[:, end:] = ends[0]
            break
    return x


def _schedule(masks: int, steps: int) -> Iterator[int]:
    base, more = divmod(masks, steps)
    return iter([base + 1] * more + [base] * (steps - more))


def _commit(
    checkpoint: Checkpoint, x: torch.Tensor, end: int, count: int, threshold: float | None
) -> None:
    if checkpoint.block:
        x = x[:, :end]
        index = torch.arange(end) // checkpoint.block
        visible = (index[None, :] <= index[:, None]).expand(len(x), 1, end, end)
        logits = checkpoint.model(input_ids=x, attention_mask=visible, use_cache=False).logits
    else:
        logits = checkpoint.model(input_ids=x, use_cache=False).logits
    if checkpoint.family == "dream":
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    logits[..., checkpoint.mask] = -torch.inf
    sure, tokens = logits[:, :end].softmax(-1).max(-1)
    sure = torch.where(x[:, :end] == checkpoint.mask, sure, -1.0)
    best = sure.topk(count, dim=-1).indices
    chosen = torch.zeros_like(sure, dtype=torch.bool).scatter_(1, best, True)
    if threshold is not None:
        chosen |= sure >= threshold
    chosen &= sure >= 0
    x[:, :end] = torch.where(chosen, tokens, x[:, :end])


def answers(checkpoint: Checkpoint, questions: list[str], how: Decoding) -> list[str]:
    """The answer to each question; prompts of one length are decoded together."""
    by_length: dict[int, list[int]] = {}
    prompts = [encode(checkpoint, question) for question in questions]
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    found = [""] * len(questions)
    for rows in by_length.values():
        for i in range(0, len(rows), 64):
            part = rows[i : i + 64]
            ids = decode(checkpoint, [prompts[row] for row in part], how)
            for row, answer in zip(part, ids.tolist(), strict=True):
                # Tokens after the end of text are not part of an answer.
                ended = next(
                    (at for at, i in enumerate(answer) if i in checkpoint.ends), len(answer)
                )
                text = checkpoint.tokenizer.decode(answer[:ended], skip_special_tokens=True)
                found[row] = text.strip()
    return found


def score_task(checkpoint: Checkpoint, task: str, count: int, how: Decoding) -> dict[str, object]:
    """Exact match on held-out questions of one task, and some wrong answers."""
    examples: list[Example] = corpus.held_out_set(task, count)
    given = answers(checkpoint, [example.question for example in examples], how)
    wrong = [
        {"question": example.question, "expected": example.answer, "given": answer}
        for example, answer in zip(examples, given, strict=True)
        if answer != example.answer
    ]
    right = len(examples) - len(wrong)
    return {
        "questions": len(examples),
        "right": right,
        "exact_match": right / len(examples),
        "misses": wrong[:5],
    }


def score_all(
    checkpoint: Checkpoint, tasks: list[str], count: int, how: Decoding
) -> dict[str, dict[str, object]]:
    """Score the tasks one after the other, printing a table row for each."""
    # A paragraph needs a longer canvas than other answers.
    longer = Decoding(128, how.block, 128 * how.steps // how.length, how.threshold)
    results = {}
    print("| task | questions | exact match |\n| --- | ---: | ---: |")
    for task in tasks:
        chosen = longer if task == "paragraph" and how.length < 128 else how
        result = results[task] = score_task(checkpoint, task, count, chosen)
        print(f"| {task} | {result['questions']} | {result['exact_match']:.1%} |", flush=True)
    return results


def guide_samples(checkpoint: Checkpoint, how: Decoding) -> dict[str, str]:
    """The answers to the questions of the deployment guide, with room for a paragraph."""
    questions = list(corpus.GUIDE_QUESTIONS)
    given = answers(checkpoint, questions, Decoding(128, how.block, 128, how.threshold))
    return dict(zip(questions, given, strict=True))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=100, help="questions per task at most")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--steps", type=int, help="number of steps (default: the length)")
    parser.add_argument("--threshold", type=float, help="commit all positions this sure")
    parser.add_argument("--tasks", nargs="+", choices=corpus.TASKS, default=list(corpus.TASKS))
    parser.add_argument("--threads", type=int, default=1, help="more help only on an idle machine")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def main() -> None:
    """Score every task, print the table and the guide's answers."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    length = options.gen_length
    how = Decoding(length, options.block_length, options.steps or length, options.threshold)
    if length % how.block or how.steps % (length // how.block):
        sys.exit("block-length must divide gen-length, and the blocks must divide steps")
    checkpoint = open_checkpoint(options.checkpoint)
    results = score_all(checkpoint, options.tasks, options.count, how)
    mean = sum(float(str(r["exact_match"])) for r in results.values()) / len(results)
    print(f"| mean over tasks | | {mean:.1%} |")
    samples = guide_samples(checkpoint, how)
    for question, answer in samples.items():
        print(f"\n> {question}\n\n{answer}")
    if options.json:
        summary = {
            "decoding": asdict(how),
            "mean_exact_match": mean,
            "tasks": results,
            "samples": samples,
        }
        options.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
