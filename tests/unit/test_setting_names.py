"""Each part knows the names of all settings, so that it can tell a misspelt one."""

from pathlib import Path

import pytest

from adapter.setting_names import NAMES, misspelt
from tools import setting_names

ROOT = Path(__file__).parents[2]


def test_the_list_holds_all_settings() -> None:
    """The list has every setting of launcher, adapter and engine, as `make fields` writes it."""
    assert setting_names.names() == list(NAMES)
    text = (ROOT / setting_names.SOURCE).read_text()
    assert setting_names.written(text) == text, "run `make fields`"
    assert setting_names.written(text.replace("CACHE", "CASH")) == text


@pytest.mark.parametrize("path", setting_names.COPIES)
def test_the_copies_are_the_same(path: str) -> None:
    """Launcher, adapter and Triton model, which import nothing of each other, agree."""
    assert (ROOT / path).read_text() == (ROOT / setting_names.SOURCE).read_text()


def test_a_misspelt_name_is_told_with_the_nearest_one() -> None:
    """Only names that begin with DLLM_ and that no part reads are told."""
    assert misspelt(["DLLM_CAHCE", "DLLM_CACHE", "PATH", "DLLM_QZX"]) == [
        "DLLM_CAHCE is not a setting and is ignored; did you mean DLLM_CACHE?",
        "DLLM_QZX is not a setting and is ignored; see docs/settings.md",
    ]
