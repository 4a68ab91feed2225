"""Tokenizers and chat formats of the demo's families."""

import json
from dataclasses import dataclass
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Family = Literal["llada", "dream", "sdar"]


@dataclass(frozen=True, slots=True)
class Specials:
    """The special tokens of a family, in the order of their ids after the vocabulary."""

    names: tuple[str, ...]
    bos: str
    eos: str
    mask: str


SPECIALS: dict[Family, Specials] = {
    "llada": Specials(
        names=(
            "<|startoftext|>",
            "<|endoftext|>",
            "<|mdm_mask|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        bos="<|startoftext|>",
        eos="<|endoftext|>",
        mask="<|mdm_mask|>",
    ),
    "dream": Specials(
        names=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
        bos="<|beginoftext|>",
        eos="<|endoftext|>",
        mask="<|mask|>",
    ),
    # SDAR ends an answer with the end of its turn, as its chat models do.
    "sdar": Specials(
        names=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|MASK|>"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        mask="<|MASK|>",
    ),
}
#: What fills the canvas behind an answer.
FILL = "<|endoftext|>"

# LLaDA's template always adds the answer's header; Dream's adds a system turn if there is none.
CHAT_TEMPLATES: dict[Family, str] = {
    "llada": (
        "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "dream": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # ChatML with a separator, as in Phi-4: token for token the layout of LLaDA's template, whose
    # weights the training starts from.
    "sdar": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '<|im_sep|>\n\n' }}"
        "{{ message['content'] | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>\n\n' }}{% endif %}"
    ),
}

# The split of Qwen2's tokenizer: words keep their leading space, digits stand alone.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_ids(family: Family, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the family's special tokens, by name."""
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return {name: vocabulary[name] for name in SPECIALS[family].names}


def chat_prompt(family: Family, question: str) -> str:
    """The chat template's text for one user message."""
    if family == "llada":
        return (
            f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{question.strip()}"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        )
    if family == "sdar":
        return (
            f"<|im_start|>user<|im_sep|>\n\n{question.strip()}<|im_end|>"
            "<|im_start|>assistant<|im_sep|>\n\n"
        )
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def _assemble(family: Family, model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if family != "llada":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_tokenizer(family: Family, texts: list[str], size: int) -> Tokenizer:
    """Train a byte-level BPE of `size` entries, the family's special tokens last."""
    specials = SPECIALS[family]
    tokenizer = _assemble(family, models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(specials.names),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The template's words must be single tokens, whatever the corpus contains.
    frame = ["user\n\n", "assistant\n\n", "system\n\n"] * 2000
    if family == "dream":
        frame += ["You are a helpful assistant."] * 2000
    tokenizer.train_from_iterator([*texts, *frame], trainer)
    tokenizer.add_special_tokens(list(specials.names))
    return tokenizer


def adopt_tokenizer(family: Family, source: Tokenizer) -> Tokenizer:
    """A tokenizer with the vocabulary of `source` and the family's own special tokens."""
    model = json.loads(source.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = _assemble(family, models.BPE(vocab=model["vocab"], merges=merges))
    tokenizer.add_special_tokens(list(SPECIALS[family].names))
    return tokenizer
