"""Starts a model of one family from the weights of another family's checkpoint."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer

from demo import corpus
from demo.batches import RowMaker
from demo.chat import FILL, SPECIALS, Family
from demo.model_format import Shape, load, read_tokenizer
from demo.widen import widen


def _head_means(weight: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Merge key or value heads by their mean (Ainslie et al. 2023, GQA, 2.1)."""
    split = weight.unflatten(0, (kv_heads, heads // kv_heads, -1))  # type: ignore[no-untyped-call]
    merged: torch.Tensor = split.mean(1).flatten(0, 1)
    return merged


# Names of a family's special tokens in LLaDA.
_SAME_TOKEN = {
    "<|im_start|>": "<|start_header_id|>",
    "<|im_end|>": "<|eot_id|>",
    "<|im_sep|>": "<|end_header_id|>",
    "<|beginoftext|>": "<|startoftext|>",
    "<|mask|>": "<|mdm_mask|>",
    "<|MASK|>": "<|mdm_mask|>",
}


def transplant(
    source: Path, family: Family, model: torch.nn.Module, tokenizer: Tokenizer, shape: Shape
) -> None:
    """Copy the weights that `model` shares with the demo checkpoint in `source`.

    The source has the same family, or LLaDA's. Tokens are matched by their text; rows of tokens
    missing in the source stay unchanged.
    """
    donor_family, donor, config = load(source)
    given = donor.state_dict()
    if donor_family == family:
        model.load_state_dict(given)
        return
    state = model.state_dict()
    known: dict[str, int] = read_tokenizer(source).get_vocab()
    pairs = [
        (place, known[_SAME_TOKEN.get(token, token)])
        for token, place in tokenizer.get_vocab().items()
        if _SAME_TOKEN.get(token, token) in known
    ]
    to, origin = (torch.tensor(column) for column in zip(*pairs, strict=True))
    for name, weight in given.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name][to] = weight[origin]
        elif family == "sdar" and ".self_attn." in name:
            continue
        elif ".k_proj." in name or ".v_proj." in name:
            state[name].copy_(_head_means(weight, int(config["n_heads"]), shape.kv_heads))
        else:
            state[name].copy_(weight)
    if family == "sdar":
        widen(
            donor, model, _sample(source, known[_SAME_TOKEN["<|MASK|>"]]), shape.heads, Shape().head
        )
        # SDAR ends an answer with the token that ends a turn, LLaDA with the one that fills.
        ends = tokenizer.get_vocab()[SPECIALS["sdar"].eos]
        state["lm_head.weight"][ends] = given["lm_head.weight"][known[FILL]]


def _sample(source: Path, mask: int) -> torch.Tensor:
    """Chats of the corpus in LLaDA's format, [rows, length], with random tokens masked."""
    rng = random.Random(0)
    maker = RowMaker("llada", read_tokenizer(source))
    drawn = [corpus.sample(task, rng) for task in corpus.TASKS for _ in range(6)]
    ids = maker.rows(drawn, 64).ids
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    return torch.where(hidden, mask, ids)
