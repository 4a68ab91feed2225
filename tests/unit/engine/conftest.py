"""Tiny random checkpoints, written once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dllm_engine import LLM

from tests.support.checkpoints import write_llada
from tests.support.oracle import llada_oracle
from tests.support.reference import Forward


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are faster on one thread, above all on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer LLaDA with tokenizer and chat template."""
    return write_llada(tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="session")
def llm64(checkpoint: Path) -> LLM:
    """The engine in float64, where rounding cannot decide between tokens."""
    return LLM(checkpoint, dtype="float64", max_num_batched_tokens=512, max_num_seqs=8)


@pytest.fixture(scope="session")
def llm(checkpoint: Path) -> LLM:
    """The engine in float32."""
    return LLM(checkpoint, max_num_batched_tokens=512, max_num_seqs=8)


@pytest.fixture(scope="session")
def oracle64(checkpoint: Path) -> Forward:
    """Transformers' Llama on the same weights in float64."""
    return llada_oracle(checkpoint, torch.float64)
