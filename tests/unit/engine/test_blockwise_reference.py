"""The slow loops of block-wise models do what their definitions say."""

from pathlib import Path

import pytest
import torch

from tests.support.blockwise_reference import generate_left_to_right, generate_speculatively
from tests.support.decoder import Ids
from tests.support.family_checkpoints import write_family
from tests.support.native import native

IDS = Ids(100, (11,), (11,))


@pytest.mark.parametrize("window", [2, 5, 8])
def test_speculation_changes_no_token(tmp_path: Path, window: int) -> None:
    """Nemotron's self-speculation gives the greedy left-to-right answer, for any window."""
    forward = native(write_family(tmp_path, "nemotron"), torch.float32)
    generator = torch.Generator().manual_seed(3)
    for length in (1, 7, 20):
        prompt = torch.randint(128, 499, (length,), generator=generator).tolist()
        plain = generate_left_to_right(forward, prompt, 20, IDS)
        found, drafts = generate_speculatively(forward, prompt, 20, IDS, window=window)
        assert found == plain
        assert drafts <= 20
