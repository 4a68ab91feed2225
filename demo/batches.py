"""Makes rows of token ids for training, and masks some of their positions.

All rows of a batch have one length: the canvas takes the room after each prompt and is filled with
the end token. So no row needs padding, and canvases of many lengths occur.
"""

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from demo import corpus
from demo.chat import FILL, SPECIALS, Family, chat_prompt, special_ids
from demo.corpus import Example

BLOCK = 32
LONG_TASKS = ("paragraph", "definition")
# Tasks whose questions and answers need more room than the smallest rows.
WIDE_TASKS = ("sorting", "counting", "capital", "country")
SMALL_TASKS = tuple(task for task in corpus.TASKS if task not in (*LONG_TASKS, *WIDE_TASKS))
SMALL_TALK_SHARE = 0.02
# Rows are this many tokens longer for Dream, whose template adds a system turn.
EXTRA: dict[Family, int] = {"llada": 0, "dream": 8, "sdar": 0}
# Row lengths and their shares.
Lengths = tuple[tuple[int, float], ...]
# Small canvases are cheap; some must be as long as in serving.
SMALL_LENGTHS: Lengths = ((28, 0.60), (52, 0.20), (88, 0.16), (152, 0.04))
WIDE_LENGTHS: Lengths = ((42, 0.60), (58, 0.20), (88, 0.16), (152, 0.04))
LONG_LENGTHS: Lengths = ((52, 0.20), (88, 0.25), (132, 0.30), (152, 0.20), (280, 0.05))
# Rows of a batch of blocks; a row is as long as its answer needs.
BLOCK_ROWS: dict[Lengths, int] = {SMALL_LENGTHS: 40, WIDE_LENGTHS: 16, LONG_LENGTHS: 7}


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch: ids [rows, length], and per row the prompt's length and the answer's.

    The answer's length counts its end token; it is cut where the canvas ends.
    """

    ids: torch.Tensor
    prompt: torch.Tensor
    answer: torch.Tensor


@dataclass(frozen=True, slots=True)
class Masking:
    """Masked positions [rows, length] and the weight of each in the loss (0: ignored)."""

    hidden: torch.Tensor
    weight: torch.Tensor


class RowMaker:
    """Turns examples into rows of ids for one family."""

    def __init__(self, family: Family, tokenizer: Tokenizer) -> None:
        self.family: Family = family
        self.tokenizer = tokenizer
        ids = special_ids(family, tokenizer)
        self.end = ids[SPECIALS[family].eos]
        self.fill = ids[FILL]
        self.mask = ids[SPECIALS[family].mask]

    def encode(self, text: str) -> list[int]:
        """Ids of a text that may contain special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def parts(self, example: Example) -> tuple[list[int], list[int]]:
        """Ids of the prompt in the chat format, and of the answer with its end token."""
        prompt = self.encode(chat_prompt(self.family, example.question))
        return prompt, [*self.encode(example.answer), self.end]

    def size(self, example: Example) -> int:
        """Tokens of the prompt, the answer and its end."""
        prompt, answer = self.parts(example)
        return len(prompt) + len(answer)

    def rows(self, examples: list[Example], length: int) -> Rows:
        """Lay the examples out in rows of one length; answers too long for it are cut."""
        ids = torch.full((len(examples), length), self.fill)
        prompts, answers = [], []
        for i, example in enumerate(examples):
            prompt, answer = self.parts(example)
            filled = (prompt + answer)[:length]
            ids[i, : len(filled)] = torch.tensor(filled)
            prompts.append(len(prompt))
            answers.append(len(filled) - len(prompt))
        return Rows(ids, torch.tensor(prompts), torch.tensor(answers))

    def hide(self, rows: Rows, hidden: torch.Tensor) -> torch.Tensor:
        """The ids with masked positions replaced by the mask token."""
        return torch.where(hidden, self.mask, rows.ids)


def draw(weights: dict[str, float], count: int, rng: random.Random) -> list[Example]:
    """Training examples, their tasks drawn by weight."""
    tasks = rng.choices(list(weights), weights=list(weights.values()), k=count)
    drawn = [
        corpus.small_talk(rng) if rng.random() < SMALL_TALK_SHARE else corpus.sample(task, rng)
        for task in tasks
    ]
    return [corpus.loosen(example, rng) for example in drawn]


def pick_length(lengths: Lengths, rng: random.Random) -> int:
    """A row length, drawn by its share."""
    return rng.choices([n for n, _ in lengths], weights=[share for _, share in lengths])[0]


def canvas(rows: Rows) -> torch.Tensor:
    """Positions after the prompt, [rows, length]."""
    return torch.arange(rows.ids.shape[1]) >= rows.prompt[:, None]


def mask_rows(rows: Rows, generator: torch.Generator, doubt: torch.Tensor) -> Masking:
    """Mask positions in the patterns that decoding meets.

    `doubt` [rows, length] ranks a row's positions by the model's confidence: 0 is the least sure
    position. In half the rows a share of the least sure positions is masked, since decoding by
    confidence leaves those for last.

    A fifth of the rows are masked completely, as at the first step. The rest mask a random share
    of the answer and another random share of the end tokens after it, since decoding commits
    those first. In half of the others one block is active: the text before it is known, the text
    after it is masked.
    """
    count, length = rows.ids.shape

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    offset = torch.arange(length) - rows.prompt[:, None]
    in_canvas = offset >= 0
    in_answer = in_canvas & (offset < rows.answer[:, None])
    answer_share = torch.where(uniform(count, 1) < 0.1, 1.0, uniform(count, 1) ** 1.5)
    # Below 0 nothing after the answer is masked, above 1 everything is.
    tail_share = uniform(count, 1) * 2.5 - 0.75
    noise = uniform(count, length)
    # Decoding reaches far end tokens first: in half the rows the masked ones are the nearest.
    behind = (offset - rows.answer[:, None]) / (length - rows.prompt - rows.answer + 1)[:, None]
    noise = torch.where(in_answer | (uniform(count, 1) < 0.5), noise, behind)
    hidden = torch.where(in_answer, noise < answer_share, (noise < tail_share) & in_canvas)
    # Half of these mask only a few of the answer's tokens: the last steps of decoding.
    last_steps = uniform(count, 1) * (rows.answer[:, None] + 2) / in_canvas.sum(1, keepdim=True)
    reach = torch.where(uniform(count, 1) < 0.5, last_steps, uniform(count, 1) ** 1.5)
    doubtful = in_canvas & (doubt < reach)
    hidden = torch.where(uniform(count, 1) < 0.5, doubtful, hidden)

    blocks = (rows.answer[:, None] + BLOCK - 1) // BLOCK
    start = BLOCK * (uniform(count, 1) * blocks).long()
    by_block = torch.where(offset < start, False, hidden | (offset >= start + BLOCK))
    mode = uniform(count, 1)
    hidden = torch.where(mode < 0.4, hidden, by_block)
    nothing = ~(hidden & in_answer).any(1, keepdim=True)
    hidden = torch.where((mode > 0.8) | nothing, in_canvas, hidden)

    # A row with one masked position counts about as much as a fully masked one: decoding meets
    # nearly finished answers as often as empty ones, and the model learns them badly otherwise.
    # The end of the answer is hard to learn, so the end tokens next to it count too; of the
    # rest a sample is enough.
    near = in_canvas & (offset < rows.answer[:, None] + 8)
    sampled = uniform(count, length) < 0.15
    weight = torch.where(in_answer, 1.0, torch.where(near, 0.6, 0.3 * sampled))
    share = (hidden & in_answer).sum(1, keepdim=True).float() ** -0.75
    return Masking(hidden, weight * hidden * share)
