"""Checkpoints with random weights, for measurements that need size rather than sense."""

from __future__ import annotations

from pathlib import Path

from tests.support.checkpoints import write_llada


def llada_60m(directory: Path) -> Path:
    """59 million parameters: 8 layers of width 512, vocabulary 32,768."""
    return write_llada(
        directory,
        tokenizer=False,
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        mlp_hidden_size=1376,
        vocab_size=32768,
        embedding_size=32768,
        max_sequence_length=1024,
    )
