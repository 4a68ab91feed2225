"""Train a demo checkpoint: `python -m demo.train --out DIR --steps N`.

Every worker is one process with one thread. On a shared CPU that is faster than threads inside one
process, which wait for each other at every operation.
"""

import argparse
import copy
import os
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from demo import batches, blockwise, corpus, optim
from demo.batches import LONG_TASKS, Lengths, RowMaker, Rows
from demo.blockwise import Doubled
from demo.chat import Family, adopt_tokenizer, build_tokenizer
from demo.model_format import (
    SDAR_BLOCK,
    Shape,
    build_model,
    export,
    load,
    read_tokenizer,
    shape_fields,
)
from demo.transplant import transplant

VOCABULARY = 1024
SHORT_TOKENS = 1000
LONG_TOKENS = 2000
SHAPES: dict[Family, Shape] = {
    "llada": Shape(),
    # Dream has fewer key heads than query heads, and so has the twin.
    "dream": Shape(kv_heads=2),
    # Wider heads make up for the norms; see demo/widen.py.
    "sdar": Shape(head=64),
}


@dataclass
class Run:
    """All state that changes during training."""

    family: Family
    shape: Shape
    maker: RowMaker
    model: torch.nn.Module
    average: torch.nn.Module
    optims: list[torch.optim.Optimizer]
    seed: int = 0
    rank: int = 0
    workers: int = 1
    #: The highest learning rate, as a share of the usual one.
    peak: float = 1.0
    #: Memory of the mean of the weights: the share kept at a step.
    memory: float = 0.998
    #: Whether products are computed in bfloat16, which new CPUs do several times as fast.
    half: bool = False
    rng: random.Random = field(default_factory=random.Random)
    generator: torch.Generator = field(default_factory=torch.Generator)
    step: int = 0
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=lambda: dict.fromkeys(corpus.TASKS, 0.0))


def start(
    family: Family,
    shape: Shape,
    seed: int,
    rank: int = 0,
    workers: int = 1,
    tokenizer: Tokenizer | None = None,
) -> Run:
    """Start a run; trains a tokenizer if none is given."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or build_tokenizer(family, corpus.tokenizer_texts(), VOCABULARY)
    model = build_model(family, shape, tokenizer.get_vocab_size())
    return Run(
        family=family,
        shape=shape,
        maker=RowMaker(family, tokenizer),
        model=model,
        average=copy.deepcopy(model),
        optims=optim.optimisers(model, rank, workers),
        seed=seed,
        rank=rank,
        workers=workers,
    )


def start_from(source: Path, family: Family, shape: Shape, options: argparse.Namespace) -> Run:
    """Start a run from the weights and the vocabulary of a demo checkpoint."""
    tokenizer = read_tokenizer(source)
    if load(source)[0] != family:
        tokenizer = adopt_tokenizer(family, tokenizer)
    run = start(family, shape, options.seed, options.rank, options.workers, tokenizer)
    transplant(source, family, run.model, tokenizer, shape)
    run.average.load_state_dict(run.model.state_dict())
    # Nothing was measured yet, but nothing is new either.
    run.scores = all_scores(run)
    return run


def save(run: Run, path: Path) -> None:
    """Write the run's whole state, replacing the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "family": run.family,
        "shape": shape_fields(run.shape),
        "tokenizer": run.maker.tokenizer.to_str(),
        "model": run.model.state_dict(),
        "average": run.average.state_dict(),
        "optims": [o.state_dict() for o in run.optims],
        "seed": run.seed,
        "step": run.step,
        "seconds": run.seconds,
        "scores": run.scores,
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def resume(path: Path, rank: int = 0, workers: int = 1) -> Run:
    """Read a run back from `save`."""
    state = torch.load(path, weights_only=True)
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    shape = Shape(**state["shape"])
    run = start(state["family"], shape, state["seed"], rank, workers, tokenizer)
    run.model.load_state_dict(state["model"])
    run.average.load_state_dict(state["average"])
    for optimiser, saved in zip(run.optims, state["optims"], strict=True):
        # The saved state must not decide which layers are this worker's.
        own = [group.get("mine") for group in optimiser.param_groups]
        optimiser.load_state_dict(saved)
        for group, mine in zip(optimiser.param_groups, own, strict=True):
            group["mine"] = mine
    run.step, run.seconds = state["step"], state["seconds"]
    run.scores |= {t: s for t, s in state["scores"].items() if t in corpus.SAMPLERS}
    return run


def hidden_states(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states, [rows, length, hidden]."""
    body = model.get_submodule("model")
    states: torch.Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
    return states


def head(model: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states."""
    logits: torch.Tensor = model.get_submodule("lm_head")(states)
    return logits


def aligned(family: Family, states: torch.Tensor) -> torch.Tensor:
    """States at the positions whose tokens they predict; Dream predicts one ahead."""
    return torch.cat([states[:, :1], states[:, :-1]], 1) if family == "dream" else states


@torch.no_grad()
def doubts(run: Run, rows: Rows) -> torch.Tensor:
    """Rank of each canvas position by the model's confidence on the empty canvas, 0 to 1.

    0 is the least sure position; positions outside the canvas have 1.
    """
    in_canvas = batches.canvas(rows)
    states = aligned(run.family, hidden_states(run.model, run.maker.hide(rows, in_canvas)))
    sure = head(run.model, states).softmax(-1).amax(-1).masked_fill(~in_canvas, 2.0)
    places = sure.argsort(1).argsort(1)
    return places / in_canvas.sum(1, keepdim=True)


def block_states(
    run: Run, model: torch.nn.Module, doubled: Doubled, hidden: torch.Tensor
) -> torch.Tensor:
    """Hidden states [rows, length, hidden] of doubled rows with `hidden` positions masked."""
    body = model.get_submodule("model")
    states: torch.Tensor = body(
        input_ids=torch.where(hidden, run.maker.mask, doubled.ids),
        position_ids=doubled.positions,
        attention_mask=blockwise.visible(doubled, SDAR_BLOCK),
        use_cache=False,
    ).last_hidden_state
    return states


def block_loss(run: Run, rows: Rows) -> torch.Tensor:
    """As `loss_of`, for block-causal attention."""
    doubled = blockwise.double(rows, SDAR_BLOCK, run.maker.fill)
    hidden, weight = blockwise.mask_blocks(doubled, SDAR_BLOCK, run.generator)
    counted = weight > 0
    logits = head(run.model, block_states(run, run.model, doubled, hidden)[counted])
    losses = F.cross_entropy(logits, doubled.ids[counted], reduction="none")
    return (losses * weight[counted]).sum()


def loss_of(run: Run, rows: Rows) -> torch.Tensor:
    """Sum over the rows of weighted cross-entropy; the head runs only where there is a weight."""
    if run.family == "sdar":
        return block_loss(run, rows)
    masking = batches.mask_rows(rows, run.generator, doubts(run, rows))
    states = aligned(run.family, hidden_states(run.model, run.maker.hide(rows, masking.hidden)))
    counted = masking.weight > 0
    logits = head(run.model, states[counted])
    losses = F.cross_entropy(logits, rows.ids[counted], reduction="none")
    return (losses * masking.weight[counted]).sum()


def missing(run: Run, tasks: tuple[str, ...]) -> dict[str, float]:
    """Share that each task still misses, never zero, so that no task is forgotten."""
    return {task: 0.1 + (1.0 - run.scores[task]) for task in tasks}


def reseed(run: Run) -> None:
    """Seed the step's random numbers, so that a resumed run equals an unbroken one."""
    run.rng.seed(f"{run.seed} {run.rank} {run.step}")
    run.generator.manual_seed(run.rng.getrandbits(60))


def share_gradients(run: Run) -> None:
    """Replace every gradient by its mean over the workers."""
    if run.workers == 1:
        return
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    flat /= run.workers
    pieces = torch.split_with_sizes(flat, [grad.numel() for grad in grads])
    for grad, mean in zip(grads, pieces, strict=True):
        grad.copy_(mean.view_as(grad))


def step_batches(run: Run) -> list[Rows]:
    """The batches of one step: small, wide and, as often as prose is wrong, long rows.

    The first two share their tokens by what their tasks still miss.
    """
    small, wide = missing(run, batches.SMALL_TASKS), missing(run, batches.WIDE_TASKS)
    share = sum(small.values()) / (sum(small.values()) + sum(wide.values()))
    plan: list[tuple[Lengths, dict[str, float], float]] = [
        (batches.SMALL_LENGTHS, small, share * SHORT_TOKENS),
        (batches.WIDE_LENGTHS, wide, (1 - share) * SHORT_TOKENS),
    ]
    prose = missing(run, LONG_TASKS)
    if run.rng.random() < 0.4 + 0.8 * sum(prose.values()):
        plan.append((batches.LONG_LENGTHS, prose, LONG_TOKENS))
    return [batch(run, lengths, weights, tokens) for lengths, weights, tokens in plan]


def batch(run: Run, lengths: Lengths, weights: dict[str, float], tokens: int) -> Rows:
    """Rows of about `tokens` tokens; of blocks, a fixed number of rows."""
    length = batches.pick_length(lengths, run.rng) + batches.EXTRA[run.family]
    if run.family != "sdar":
        count = max(2, round(tokens / length / run.workers))
        return run.maker.rows(batches.draw(weights, count, run.rng), length)
    count = max(2, batches.BLOCK_ROWS[lengths] // run.workers)
    drawn = batches.draw(weights, count, run.rng)
    # Nothing sees what lies behind the last answer's block.
    longest = max(map(run.maker.size, drawn))
    return run.maker.rows(drawn, -(-longest // SDAR_BLOCK) * SDAR_BLOCK)


def train_step(run: Run, steps: int) -> float:
    """One optimiser step; returns the mean loss per row."""
    reseed(run)
    optim.set_rate(run.optims, run.peak * optim.rate(run.step, steps))
    made = step_batches(run)
    count = sum(len(rows.ids) for rows in made)
    total = 0.0
    for rows in made:
        with torch.autocast("cpu", torch.bfloat16, enabled=run.half):
            loss = loss_of(run, rows) / count
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    share_gradients(run)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimiser in run.optims:
        optimiser.step()
        optimiser.zero_grad()
    # Early on, a long memory would slow the average down.
    decay = min(run.memory, (1 + run.step) / (10 + run.step))
    with torch.no_grad():
        current = dict(run.model.named_parameters())
        for name, mean in run.average.named_parameters():
            mean.lerp_(current[name], 1 - decay)
    run.step += 1
    return total


def completed(run: Run, rows: Rows, hidden: torch.Tensor) -> float:
    """Share of rows whose hidden answer tokens are all predicted in one pass.

    Blocks are predicted after clean ones: `hidden` does not reach the clean part.
    """
    offset = torch.arange(rows.ids.shape[1]) - rows.prompt[:, None]
    asked = hidden & (offset >= 0) & (offset < rows.answer[:, None])
    if run.family == "sdar":
        doubled = blockwise.double(rows, SDAR_BLOCK, run.maker.fill)
        padded = F.pad(hidden, (0, doubled.ids.shape[1]))
        noised = doubled.counted & padded.gather(1, doubled.positions)
        states = block_states(run, run.average, doubled, noised)
        ids, asked = doubled.ids, noised & doubled.answer
    else:
        states = aligned(run.family, hidden_states(run.average, run.maker.hide(rows, hidden)))
        ids = rows.ids
    right = head(run.average, states).argmax(-1) == ids
    return (right | ~asked).all(1).float().mean().item()


@torch.no_grad()
def quick_scores(run: Run, tasks: Iterable[str], count: int = 40) -> dict[str, float]:
    """Share of held-out answers that one pass completes correctly, at three stages of decoding.

    An empty canvas alone is not enough: nearly finished answers are harder to learn. This is far
    cheaper than decoding step by step and finds the same weaknesses.
    """
    scores = {}
    for task in tasks:
        length = (152 if task == "paragraph" else 72) + batches.EXTRA[run.family]
        rows = run.maker.rows(corpus.held_out_set(task, count, seed=7), length)
        generator = torch.Generator().manual_seed(7)
        noise = torch.rand(rows.ids.shape, generator=generator)
        in_canvas = batches.canvas(rows)
        in_answer = in_canvas & (torch.arange(length) < (rows.prompt + rows.answer)[:, None])
        whole = [
            completed(run, rows, in_canvas if share == 1.0 else in_answer & (noise < share))
            for share in (0.15, 0.5, 1.0)
        ]
        scores[task] = sum(whole) / len(whole)
    return scores


def report(run: Run, loss: float) -> None:
    """Print one line of progress."""
    scores = " ".join(f"{task}={score:.2f}" for task, score in run.scores.items())
    mean = sum(run.scores.values()) / len(run.scores)
    print(
        f"step={run.step} seconds={run.seconds:.0f} loss={loss:.4f} mean={mean:.3f} {scores}",
        flush=True,
    )


def all_scores(run: Run) -> dict[str, float]:
    """The scores of all tasks; the workers share the work."""
    mine = quick_scores(run, corpus.TASKS[run.rank :: run.workers])
    if run.workers == 1:
        return mine
    parts: list[dict[str, float]] = [{}] * run.workers
    distributed.all_gather_object(parts, mine)
    merged = {task: score for part in parts for task, score in part.items()}
    return {task: merged[task] for task in corpus.TASKS}


def train(run: Run, steps: int, every: int, out: Path, state: Path) -> None:
    """Train up to `steps`; score, save and export at intervals."""
    recent = 0.0
    while run.step < steps:
        since = time.monotonic()
        loss = train_step(run, steps)
        recent = loss if not recent else 0.98 * recent + 0.02 * loss
        if run.step % every == 0 or run.step == steps:
            run.scores = all_scores(run)
            if run.rank == 0:
                report(run, recent)
                save(run, state)
                weights = run.average.state_dict()
                export(run.family, weights, run.maker.tokenizer, run.shape, out)
        run.seconds += time.monotonic() - since


def work(rank: int, meeting: str, options: argparse.Namespace) -> None:
    """One worker, from the first step to the last."""
    torch.set_num_threads(1)
    if options.workers > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.workers
        )
    shape = SHAPES[options.family]
    if options.resume:
        run = resume(options.resume, rank, options.workers)
    elif options.start_from:
        options.rank = rank
        run = start_from(options.start_from, options.family, shape, options)
    else:
        run = start(options.family, shape, options.seed, rank, options.workers)
    run.peak, run.half = options.peak, options.bf16
    run.memory = options.memory
    state = options.state or options.out.with_name(options.out.name + ".state.pt")
    train(run, options.steps, options.every, options.out, state)
    if options.workers > 1:
        distributed.destroy_process_group()


def main() -> None:
    """Parse the options and start the workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--steps", type=int, default=12000, help="number of optimiser steps")
    parser.add_argument("--family", choices=("llada", "dream", "sdar"), default="llada")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=400, help="steps between scores and saves")
    parser.add_argument("--state", type=Path, help="training state (default: OUT.state.pt)")
    parser.add_argument("--start-from", type=Path, help="demo checkpoint to start from")
    parser.add_argument("--memory", type=float, default=0.998, help="of the mean of the weights")
    parser.add_argument("--bf16", action="store_true", help="compute products in bfloat16")
    parser.add_argument("--peak", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--resume", type=Path, help="training state to resume")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        if options.workers == 1:
            work(0, meeting, options)
        else:
            arguments = (meeting, options)
            spawn(work, arguments, options.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
