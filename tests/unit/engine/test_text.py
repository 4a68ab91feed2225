"""Prompts become tokens, canvases become text, and user text never becomes a special token."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from dllm_engine import CheckpointError, InvalidRequest
from dllm_engine.tokenizer import Tokenizer, find_stop
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.support.checkpoints import (
    BOS,
    DREAM_MASK,
    DREAM_SPECIALS,
    EOS,
    EOT,
    LLADA_SPECIALS,
    MASK,
    write_dream,
    write_llada,
)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of the random checkpoint: bytes and LLaDA's special tokens."""
    loaded = Tokenizer.load(checkpoint, MASK)
    assert loaded is not None
    return loaded


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decoded text, including incomplete characters."""
    return tokenizer.decode(np.array(ids, dtype=np.int32))


@pytest.mark.parametrize("text", ["hello", "naïve café", "汉字 🙂", " lead and trail ", "a\nb\t"])
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """Any Unicode text encodes and decodes to itself."""
    assert text_of(tokenizer, tokenizer.encode_text(text)) == text


def test_a_message_is_rendered_by_the_chat_template(tokenizer: Tokenizer) -> None:
    """One user message becomes begin-of-text, header, content, end of turn and assistant header."""
    ids = tokenizer.encode_chat("Hi")
    assert ids[0] == BOS
    assert ids.count(EOT) == 1
    assert text_of(tokenizer, ids) == "user\n\nHiassistant\n\n"


def test_turns_and_roles_are_kept(tokenizer: Tokenizer) -> None:
    """System, user and assistant messages keep their order and roles."""
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"m{i}"} for i, role in enumerate(roles)]
    ids = tokenizer.encode_messages(json.dumps(messages))
    expected = "system\n\nm0user\n\nm1assistant\n\nm2user\n\nm3assistant\n\n"
    assert text_of(tokenizer, ids) == expected
    assert ids.count(EOT) == 4


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of a Dream checkpoint: bytes and Qwen's special tokens."""
    loaded = Tokenizer.load(write_dream(tmp_path_factory.mktemp("dream")), DREAM_MASK)
    assert loaded is not None
    return loaded


#: Two turns behind a system message; content with space around it, and control tokens by name.
TURNS = [
    ("system", "Be brief."),
    ("user", " Hi <|mask|><|mdm_mask|> "),
    ("assistant", "Yes?<|im_end|><|eot_id|>"),
    ("user", "é\n"),
]


def messages_of(turns: list[tuple[str, str]]) -> str:
    """Messages as the JSON of a request."""
    return json.dumps([{"role": role, "content": content} for role, content in turns])


def literal(tokenizer: Tokenizer, text: str) -> list[int]:
    """Text encoded bracket by bracket, so that it contains no whole name of a special token."""
    return [i for piece in re.split("(<)", text) if piece for i in tokenizer.encode_text(piece)]


def test_llada_turns_are_rendered_token_by_token(tokenizer: Tokenizer) -> None:
    """LLaDA's template writes begin-of-text once, each turn with header and end, stripped content,
    and the header of the answer."""
    header, end_header = LLADA_SPECIALS["<|start_header_id|>"], LLADA_SPECIALS["<|end_header_id|>"]

    expected = [BOS]
    for role, content in TURNS:
        expected += [
            header,
            *literal(tokenizer, role),
            end_header,
            *literal(tokenizer, "\n\n" + content.strip()),
            EOT,
        ]
    expected += [header, *literal(tokenizer, "assistant"), end_header, *literal(tokenizer, "\n\n")]
    assert tokenizer.encode_messages(messages_of(TURNS)) == expected


@pytest.mark.parametrize("has_system", [True, False])
def test_dream_turns_are_rendered_token_by_token(dream: Tokenizer, has_system: bool) -> None:
    """Qwen's template adds its own system message if there is none, keeps content unchanged, and
    starts the answer."""
    start, end = DREAM_SPECIALS["<|im_start|>"], DREAM_SPECIALS["<|im_end|>"]

    turns = TURNS if has_system else TURNS[1:]
    rendered = turns if has_system else [("system", "You are a helpful assistant."), *turns]
    expected: list[int] = []
    for role, content in rendered:
        expected += [start, *literal(dream, f"{role}\n{content}"), end, *literal(dream, "\n")]
    expected += [start, *literal(dream, "assistant\n")]
    assert dream.encode_messages(messages_of(turns)) == expected


@pytest.mark.parametrize(
    ("family", "mask", "name", "end"),
    [
        ("llada", MASK, "<|mdm_mask|>", "<|eot_id|>"),
        ("dream", DREAM_MASK, "<|mask|>", "<|im_end|>"),
    ],
)
def test_a_mask_in_a_suffix_stays_text(
    tokenizer: Tokenizer, dream: Tokenizer, family: str, mask: int, name: str, end: str
) -> None:
    """The mask token in a suffix stays text; other special tokens are recognised, as in a raw
    prompt."""
    either = {"llada": tokenizer, "dream": dream}[family]
    ids = either.encode_suffix(f" a{name}b{end}")
    assert mask not in ids
    assert text_of(either, ids) == f" a{name}b"
    assert ids[-1] in either.stop_token_ids
    assert either.encode_suffix("") == []


@pytest.mark.parametrize(
    "special", ["<|mdm_mask|>", "<|eot_id|>", "<|startoftext|>", "\ue0000\ue001"]
)
def test_special_tokens_in_a_message_stay_text(tokenizer: Tokenizer, special: str) -> None:
    """Text in a message never becomes a special token."""
    plain = tokenizer.encode_chat("")
    ids = tokenizer.encode_chat(f"a{special}b")
    assert [ids.count(i) for i in range(500, 506)] == [plain.count(i) for i in range(500, 506)]
    assert f"a{special}b" in text_of(tokenizer, ids)


def test_threads_do_not_take_each_others_text_for_control_tokens(tokenizer: Tokenizer) -> None:
    """Prompts encoded concurrently give the same tokens as alone."""
    text = "<|mdm_mask|>" * 20
    alone = tokenizer.encode_chat(text)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(tokenizer.encode_chat, [text] * 1500))
    assert all(ids == alone for ids in together)


def test_a_raw_prompt_keeps_templates_but_not_masks(tokenizer: Tokenizer) -> None:
    """Raw text may contain special tokens; only the mask's name stays text."""
    ids = tokenizer.encode_text("a<|eot_id|><|mdm_mask|>")
    assert EOT in ids
    assert MASK not in ids
    assert text_of(tokenizer, ids) == "a<|mdm_mask|>"


def test_without_a_template_one_message_is_taken_as_it_is(tmp_path: Path) -> None:
    """A checkpoint without a template takes one message as raw text, and rejects several."""
    base = Tokenizer.load(write_llada(tmp_path, chat_template=False), MASK)
    assert base is not None
    assert base.encode_chat("Hi") == base.encode_text("Hi")
    two = json.dumps([{"role": "user", "content": "a"}] * 2)
    with pytest.raises(InvalidRequest, match="messages: this checkpoint has no chat template"):
        base.encode_messages(two)


def test_an_empty_chat_needs_a_start_token(tmp_path: Path) -> None:
    """Messages that make no token are refused as such where no start token stands for them."""
    folder = write_llada(tmp_path, chat_template=False)
    base = Tokenizer.load(folder, MASK)
    assert base is not None
    assert base.encode_chat("") == []
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": None}))
    base = Tokenizer.load(folder, MASK)
    assert base is not None
    with pytest.raises(InvalidRequest, match="^messages: must not be empty together: .* start"):
        base.encode_chat("")


@pytest.mark.parametrize(
    "messages",
    ["", "{}", "[]", "[1]", '[{"role": "user"}]', '[{"role": "user", "content": 1}]',
     '[{"role": "user", "content": "a", "name": "b"}]'],
)  # fmt: skip
def test_malformed_messages_are_refused_by_shape(tokenizer: Tokenizer, messages: str) -> None:
    """Anything but a list of role and content strings is rejected with the expected shape."""
    with pytest.raises(InvalidRequest, match="^messages: must be a JSON list"):
        tokenizer.encode_messages(messages)


def test_empty_and_unencodable_prompts_are_refused(tokenizer: Tokenizer) -> None:
    """An empty prompt and a lone surrogate are rejected."""
    with pytest.raises(InvalidRequest, match="^text_input: must not be empty"):
        tokenizer.encode_text("")
    with pytest.raises(InvalidRequest, match="^text_input: not encodable"):
        tokenizer.encode_text("a\ud800b")


def test_half_a_character_is_never_shown(tokenizer: Tokenizer) -> None:
    """A character that spans tokens is shown once its last byte is there."""
    ids = tokenizer.encode_text("é🙂")
    assert [text_of(tokenizer, ids[:n]) for n in range(7)] == ["", "", "é", "é", "é", "é", "é🙂"]


def test_special_tokens_are_not_part_of_the_text(tokenizer: Tokenizer) -> None:
    """Special tokens inside an answer are not shown."""
    ids = [*tokenizer.encode_text("a"), EOS, *tokenizer.encode_text("b"), EOT]
    assert text_of(tokenizer, ids) == "ab"


def test_the_answer_ends_before_the_first_stop_string(tokenizer: Tokenizer) -> None:
    """The answer is cut before the earliest stop string, also across tokens."""
    ids = np.array(tokenizer.encode_text("one two three"), dtype=np.int32)
    assert tokenizer.answer(ids, ("three", "wo")) == "one t"
    assert tokenizer.answer(ids, ()) == "one two three"
    assert find_stop("abc", ("x",)) is None


def test_what_is_certain_leaves_out_a_stop_string_that_has_begun(tokenizer: Tokenizer) -> None:
    """A prefix excludes an end that may become a stop string."""
    ids = np.array(tokenizer.encode_text("a bar bars"), dtype=np.int32)
    shown = [tokenizer.prefix(ids[:n], ("bart", "ars", "a bark")) for n in range(len(ids) + 1)]
    assert shown == [""] * 6 + ["a bar "] * 5
    assert tokenizer.answer(ids, ("bart", "ars", "a bark")) == "a bar b"
    assert tokenizer.prefix(ids, ()) == "a bar bars"


@pytest.mark.parametrize("stop", [("aab",), ("ab", "ba"), ("é🙂", "🙂🙂"), ("bé",)])
@pytest.mark.parametrize("text", ["aaaab", "abab", "é🙂🙂", "aabéé", "bbb"])
def test_what_is_certain_never_shrinks(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...]
) -> None:
    """Every prefix is the beginning of all later prefixes and of the answer."""
    ids = np.array(tokenizer.encode_text(text), dtype=np.int32)
    shown = []
    for n in range(len(ids) + 1):
        if find_stop(tokenizer.decode(ids[:n]), stop) is not None:
            break
        shown.append(tokenizer.prefix(ids[:n], stop))
    shown.append(tokenizer.answer(ids[: len(shown)], stop))
    assert all(after.startswith(before) for before, after in pairwise(shown))


def test_each_position_shows_what_it_adds(tokenizer: Tokenizer) -> None:
    """Special tokens and hidden positions show nothing, and a character belongs to its last
    byte."""
    ids = np.array(
        [*tokenizer.encode_text("aé"), EOS, *tokenizer.encode_text("🙂b")], dtype=np.int32
    )
    shown = np.ones(len(ids), dtype=bool)
    assert tokenizer.pieces(ids, shown) == ["a", "", "é", "", "", "", "", "🙂", "b"]
    shown[5] = False
    assert tokenizer.pieces(ids, shown) == ["a", "", "é", "", "", "", "", "", "b"]


def test_a_whole_character_after_a_torn_one_is_found(tokenizer: Tokenizer) -> None:
    """Bytes that never become a character do not hide the character after them."""
    whole = tokenizer.encode_text("é")
    ids = np.array([*tokenizer.encode_text("🙂")[:2], *whole, whole[1]], dtype=np.int32)
    pieces = tokenizer.pieces(ids, np.ones(5, dtype=bool))
    assert pieces == ["", "", "", "é", ""]


@pytest.fixture(scope="module")
def torn() -> Tokenizer:
    """A byte-level tokenizer with tokens that hold text and part of a character, like real ones."""
    alphabet = bytes_to_unicode()
    tokens = [b" \xe2\x80", b"\x9c", b"a\xc3", b"\xa9b\xc3", b"\xa9c", b"d", b"?"]
    vocabulary = {"".join(alphabet[byte] for byte in token): i for i, token in enumerate(tokens)}
    words = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=words, mask_token="?"), 6)


@pytest.mark.parametrize(
    ("ids", "pieces"),
    [
        ([0], [" "]),
        ([0, 1, 5], [" ", "“", "d"]),
        ([2, 5], ["a", "d"]),  # never completed
        ([2, 3, 5], ["a", "éb", "d"]),  # of two é one is completed
        ([2, 3, 4], ["a", "éb", "éc"]),
        ([3, 4], ["b", "éc"]),  # nor is what the first begins with
        ([4, 1, 5], ["c", "", "d"]),
    ],
    ids=str,
)
def test_text_beside_a_torn_character_stays_where_it_is(
    torn: Tokenizer, ids: list[int], pieces: list[str]
) -> None:
    """If a token holds text and part of a character, the text is shown at once and the character
    with the token that completes it."""
    assert torn.pieces(np.array(ids), np.ones(len(ids), dtype=bool)) == pieces


@given(st.lists(st.integers(0, 255), max_size=24), st.data())
def test_no_piece_ever_holds_half_a_character(
    tokenizer: Tokenizer, ids: list[int], data: st.DataObject
) -> None:
    """No piece contains U+FFFD, whichever bytes are shown in whichever order."""
    shown = np.array([data.draw(st.booleans()) for _ in ids], dtype=bool)
    assert "\ufffd" not in "".join(tokenizer.pieces(np.array(ids, dtype=np.int32), shown))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1))
def test_the_pieces_of_a_whole_text_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    """All pieces together are the whole text, without gaps or repetitions."""
    ids = np.array(tokenizer.encode_text(text))
    assert "".join(tokenizer.pieces(ids, np.ones(len(ids), dtype=bool))) == text


def test_pieces_of_a_decoder_that_drops_the_first_space() -> None:
    """With a tokenizer that marks spaces, each position keeps its space."""
    words = tokenizers.Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "?": 2}, unk_token="?"))
    words.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, mask_token="?")
    tokenizer = Tokenizer(fast, 2)
    assert tokenizer.decode([0, 1]) == "one two"
    assert tokenizer.pieces(np.array([0, 1]), np.array([True, True])) == [" one", " two"]


def test_dreams_tokenizer_is_read_without_its_own_code(tmp_path: Path) -> None:
    """vocab.json and merges.txt under Dream's own class are read as Qwen2's."""
    dream = Tokenizer.load(write_dream(tmp_path), DREAM_MASK)
    assert dream is not None
    assert text_of(dream, dream.encode_text("héllo 汉 🙂")) == "héllo 汉 🙂"
    ids = dream.encode_chat("a<|mask|>b<|im_end|>")
    assert DREAM_MASK not in ids
    assert ids.count(DREAM_SPECIALS["<|im_end|>"]) == 2
    assert text_of(dream, ids).startswith("system\nYou are a helpful assistant.\nuser\na<|mask|>b")
    assert DREAM_SPECIALS["<|im_end|>"] in dream.stop_token_ids


def test_a_tokenizer_without_the_mask_token_is_refused(tmp_path: Path) -> None:
    """A tokenizer without the mask token is rejected with that reason."""
    write_dream(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer: has no token 505, the mask token"):
        Tokenizer.load(tmp_path, 505)


def test_a_checkpoint_without_a_tokenizer_has_no_tokenizer(tmp_path: Path) -> None:
    """A checkpoint without a tokenizer can be served by token ids."""
    assert Tokenizer.load(write_llada(tmp_path, tokenizer=False), MASK) is None
