"""Training rows for block-causal attention: each block is denoised after its clean predecessors.

All blocks of an answer are trained in one pass (Arriola et al. 2025, BD3-LM, arXiv 2503.09573): the
clean row is followed by noised copies of the answer's blocks at the same positions. A noised block
sees itself and the clean blocks before it, which is what it sees in decoding. The paper doubles the
whole row; the prompt's own blocks have nothing to predict, so they are left out here.
"""

from dataclasses import dataclass

import torch

from demo.batches import Rows


@dataclass(frozen=True, slots=True)
class Doubled:
    """Clean rows with the answers' blocks behind them; all tensors are [rows, length].

    `ids` are clean everywhere. `counted` is where the noised part has something to predict: the
    answer, and what fills its last block.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    noised: torch.Tensor
    counted: torch.Tensor
    answer: torch.Tensor


def double(rows: Rows, block: int, fill: int) -> Doubled:
    """Append the blocks that hold the answer, from the one in which the prompt ends."""
    count, length = rows.ids.shape
    first = rows.prompt // block
    ends = rows.prompt + rows.answer
    blocks = int(((ends - 1) // block - first).max()) + 1
    copied = first[:, None] * block + torch.arange(blocks * block)
    padded = torch.nn.functional.pad(rows.ids, (0, blocks * block + block), value=fill)
    positions = torch.cat([torch.arange(length).expand(count, -1), copied], 1)
    noised = torch.zeros_like(positions, dtype=torch.bool)
    noised[:, length:] = True
    stop = ((ends + block - 1) // block * block)[:, None]
    counted = noised & (positions >= rows.prompt[:, None]) & (positions < stop)
    return Doubled(
        ids=torch.cat([rows.ids, padded.gather(1, copied)], 1),
        positions=positions,
        noised=noised,
        counted=counted,
        answer=counted & (positions < ends[:, None]),
    )


def visible(doubled: Doubled, block: int) -> torch.Tensor:
    """Which key each query sees, [rows, 1, length, length]."""
    index = doubled.positions // block
    query, key = index[:, :, None], index[:, None, :]
    noised_query, noised_key = doubled.noised[:, :, None], doubled.noised[:, None, :]
    clean = ~noised_key & torch.where(noised_query, key < query, key <= query)
    own = noised_query & noised_key & (key == query)
    return (clean | own)[:, None]


def mask_blocks(
    doubled: Doubled, block: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked positions and their weights in the loss, both [rows, length].

    Each block is noised on its own: two in five are masked completely, as at a block's first
    step, the others at a random share.
    """
    count, length = doubled.ids.shape
    clean = int((~doubled.noised[0]).sum())
    blocks = (length - clean) // block
    share = torch.rand(count, blocks, 1, generator=generator)
    whole = torch.rand(count, blocks, 1, generator=generator) < 0.4
    noise = torch.rand(count, blocks, block, generator=generator)
    counted = doubled.counted[:, clean:].unflatten(1, (blocks, block))
    hidden = counted & (whole | (noise < share))
    weight = torch.where(doubled.answer[:, clean:].unflatten(1, (blocks, block)), 1.0, 0.4)
    # A block with one mask left counts nearly as much as an empty one, and an answer of one block
    # nearly as much as a paragraph: weights fall with the masks and with the blocks.
    masks = hidden.sum(2, keepdim=True).clamp(min=1)
    used = counted.any(2, keepdim=True).sum(1, keepdim=True)
    weight = weight * hidden * (masks * used).float() ** -0.6
    head = torch.zeros(count, clean)
    return (
        torch.cat([head.bool(), hidden.flatten(1)], 1),
        torch.cat([head, weight.flatten(1)], 1),
    )
