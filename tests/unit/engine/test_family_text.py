"""Tokenizers and chat templates of the families, with the ids of their published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dllm_engine import CheckpointError
from dllm_engine.models.files import find_mask_token
from dllm_engine.tokenizer import Tokenizer

from tests.support.family_checkpoints import FAMILIES, write_family_tokenizer

TURNS = [("user", "Hi"), ("assistant", "Yes?"), ("user", "é\n")]
#: What the templates write around a turn's role and content, before the turns, and behind them.
_CHATML = ("<|im_start|>", "\n", "<|im_end|>", "\n")
_ANSWER = ["<|im_start|>", "assistant\n"]
_HELPFUL = ["<|im_start|>", "system\nYou are a helpful assistant.", "<|im_end|>", "\n"]
_EMPTY = ["<s>", "<|im_start|>", "system\n", "<|im_end|>", "\n"]
EXPECTED: dict[str, tuple[list[str], tuple[str, str, str, str], list[str]]] = {
    "sdar": ([], _CHATML, _ANSWER),
    "fast_dllm": (_HELPFUL, _CHATML, _ANSWER),
    "nemotron": (_EMPTY, _CHATML, [*_ANSWER, "<think>", "</think>"]),
    "illada": (["<s>"], ("", ": ", "</s>", ""), ["assistant: "]),
}
STOPS = {
    "sdar": {151643, 151645},
    "fast_dllm": {151643, 151645},
    "nemotron": {11},
    "illada": set(),  # config.json names it
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family's name."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def tokenizer(family: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with the published special tokens, loaded with the mask that its files name."""
    directory, made = tmp_path_factory.mktemp(family), FAMILIES[family]
    write_family_tokenizer(directory, family, made.published)
    mask = find_mask_token(directory, {}, made.mask, None)
    assert mask == made.published[made.mask]
    loaded = Tokenizer.load(directory, mask)
    assert loaded is not None
    return loaded


def test_turns_are_rendered_token_by_token(family: str, tokenizer: Tokenizer) -> None:
    """The template writes each turn between its tokens, and where the answer begins."""
    published = FAMILIES[family].published
    before, (start, colon, end, gap), answer = EXPECTED[family]
    pieces = [*before]
    for role, content in TURNS:
        pieces += [start, f"{role}{colon}{content}", end, gap]
    expected: list[int] = []
    for piece in [*pieces, *answer]:
        if piece:
            known = published.get(piece)
            expected += tokenizer.encode_text(piece) if known is None else [known]
    messages = json.dumps([{"role": role, "content": content} for role, content in TURNS])
    assert tokenizer.encode_messages(messages) == expected


def test_ends_of_turns_are_known_by_name(family: str, tokenizer: Tokenizer) -> None:
    """An answer ends at the tokenizer's end of text and end of turn."""
    assert set(tokenizer.stop_token_ids) == STOPS[family]


def test_the_masks_name_stays_text(family: str, tokenizer: Tokenizer) -> None:
    """Neither a prompt nor a message that spells the mask's name contains the mask."""
    made = FAMILIES[family]
    for ids in (tokenizer.encode_text(f"a{made.mask}b"), tokenizer.encode_chat(made.mask)):
        assert made.published[made.mask] not in ids
    assert tokenizer.decode(tokenizer.encode_text(f"a{made.mask}b")) == f"a{made.mask}b"


def test_a_mask_that_text_may_contain_is_refused(tmp_path: Path) -> None:
    """A mask token that is an ordinary piece of text cannot be told from it."""
    made = FAMILIES["illada"]
    write_family_tokenizer(tmp_path, "illada", made.specials)
    with pytest.raises(CheckpointError, match="mask token 50 is ordinary text"):
        Tokenizer.load(tmp_path, 50)
