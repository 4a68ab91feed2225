"""Training of the demo's block-wise checkpoint: rows of blocks, and the weights it starts from."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from demo import batches, blockwise, corpus
from demo.batches import RowMaker, Rows
from demo.model_format import Shape, build_model, load, read_tokenizer
from demo.widen import widen

DEMO = Path(__file__).parents[3] / "model_repository/dllm/1/demo_checkpoint"
BLOCK = 8
FILL, MASK = 48, 49
SMALL = Shape(hidden=32, layers=2, heads=2, kv_heads=2, mlp=32, head=16)


def test_a_doubled_row_gives_the_logits_of_decoding() -> None:
    """A noised block beside all others has the logits that it has alone behind the clean ones."""
    torch.manual_seed(0)
    model = build_model("sdar", SMALL, 50).eval()
    ids = torch.randint(0, FILL, (3, 24))
    rows = Rows(ids, torch.tensor([5, 8, 11]), torch.tensor([6, 3, 12]))
    doubled = blockwise.double(rows, BLOCK, FILL)
    hidden, weight = blockwise.mask_blocks(doubled, BLOCK, torch.Generator().manual_seed(0))
    assert ((weight > 0) == hidden).all()
    noised = torch.where(hidden, MASK, doubled.ids)
    with torch.no_grad():
        seen = model(
            input_ids=noised,
            position_ids=doubled.positions,
            attention_mask=blockwise.visible(doubled, BLOCK),
        ).logits
        for row, block in [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2)]:
            cells = doubled.noised[row] & (doubled.positions[row] // BLOCK == block)
            alone = torch.cat([ids[row, : block * BLOCK], noised[row, cells]])[None]
            index = torch.arange(alone.shape[1]) // BLOCK
            visible = (index[None, :] <= index[:, None])[None, None]
            expected = model(input_ids=alone, attention_mask=visible).logits[0, block * BLOCK :]
            torch.testing.assert_close(seen[row, cells], expected, rtol=1e-4, atol=1e-5)


def test_prompts_and_what_follows_the_last_block_are_never_masked() -> None:
    """Masks lie in the answer and in what fills its last block."""
    rows = Rows(torch.zeros(2, 32, dtype=torch.long), torch.tensor([5, 12]), torch.tensor([6, 5]))
    doubled = blockwise.double(rows, BLOCK, FILL)
    for seed in range(20):
        hidden, _ = blockwise.mask_blocks(doubled, BLOCK, torch.Generator().manual_seed(seed))
        for row, (first, stop) in enumerate([(5, 16), (12, 24)]):
            places = doubled.positions[row, hidden[row]]
            assert ((places >= first) & (places < stop)).all()


def test_a_model_with_norms_starts_as_the_one_without() -> None:
    """SDAR's norms of queries and keys hardly change what LLaDA's weights compute."""
    family, donor, _ = load(DEMO)
    tokenizer = read_tokenizer(DEMO)
    maker = RowMaker(family, tokenizer)
    rng = random.Random(1)
    rows = maker.rows([corpus.sample(task, rng) for task in corpus.TASKS for _ in range(3)], 64)
    masked = maker.hide(rows, batches.canvas(rows))
    shape = Shape(head=64)
    model = build_model("sdar", shape, tokenizer.get_vocab_size()).eval()
    same = donor.state_dict()
    model.load_state_dict({k: v for k, v in same.items() if "self_attn" not in k}, strict=False)
    with torch.no_grad():
        before = donor(input_ids=masked).logits.argmax(-1)
        started = model(input_ids=masked).logits.argmax(-1)
        widen(donor, model, rows.ids, shape.heads, 32, steps=60)
        after = model(input_ids=masked).logits.argmax(-1)
    assert (before == started).float().mean() < 0.9
    assert (before == after).float().mean() > 0.97
