"""Every row of the table of decoding rules can be requested, is documented and has quality
scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from dllm_engine import InvalidRequest, SamplingParams
from dllm_engine.decoding import COMMIT_FIELDS, DECODINGS, Decoding, Rule, Score, decoding_of

from benchmarks.quality import MODELS, RULES, stored
from tests.support import cases

ROOT = Path(__file__).parents[3]
ROWS = pytest.mark.parametrize("row", DECODINGS, ids=lambda row: row.name)


def request_for(row: Decoding) -> dict[str, Any]:
    """The fewest fields that select a row."""
    fields: dict[str, Any] = {row.field: 0.5 if row.value is None else row.value}
    if row.also:
        fields[row.also] = True if row.also == "credit" else 0.25
    return fields


def rows_of(requests: list[dict[str, Any]]) -> set[str]:
    """Names of the rows that these requests select."""
    return {decoding_of(SamplingParams(**fields)).name for fields in requests}


@ROWS
def test_a_request_reaches_it(row: Decoding) -> None:
    """Each row is selected by a valid request that selects no other row."""
    params = SamplingParams(**request_for(row)).resolved()
    assert decoding_of(params) is row
    assert row.source
    assert row.definition


def test_names_rules_and_scores_are_all_used_once() -> None:
    """No two rows have the same name, and every rule and score has a row."""
    assert len({row.name for row in DECODINGS}) == len(DECODINGS)
    assert {row.rule for row in DECODINGS} == set(Rule)
    assert {row.score for row in DECODINGS} == {None, *Score}


def test_defaults_ask_for_llada() -> None:
    """A request without decoding fields uses LLaDA's low-confidence schedule."""
    assert decoding_of(SamplingParams()).name == "remasking=low_confidence"


def test_bounds_are_the_requests_numbers() -> None:
    """The first parameter is the selecting field, the second is the second field or its default."""
    given = SamplingParams(confidence_threshold=0.9, low_threshold=0.4)
    assert decoding_of(given).bounds(given) == (0.9, 0.4)
    given = SamplingParams(anchor_threshold=0.9)
    assert decoding_of(given).bounds(given) == (0.9, 0.75)
    given = SamplingParams(alg="origin")
    assert decoding_of(given).bounds(given) == (0.0, 0.0)


@pytest.mark.parametrize("first", COMMIT_FIELDS)
@pytest.mark.parametrize("second", COMMIT_FIELDS)
def test_two_parallel_rules_at_once_are_refused(first: str, second: str) -> None:
    """At most one field may choose how many positions a step commits."""
    if first != second:
        with pytest.raises(InvalidRequest, match="cannot be combined"):
            SamplingParams(**{first: 0.5, second: 0.5}).resolved()


@ROWS
def test_it_is_documented(row: Decoding) -> None:
    """docs/fields.md has the row's fields; docs/decoding.md has the row, word for word."""
    fields = (ROOT / "docs/fields.md").read_text()
    for word in {row.field, row.also, row.second} - {None}:
        assert f"| `{word}` |" in fields, word
    table = re.findall(
        r"^\| `(.+)` \| (.+) \| (.+) \|$", (ROOT / "docs/decoding.md").read_text(), re.M
    )
    assert table[DECODINGS.index(row)] == (row.name, row.definition, row.source)


def test_all_are_scored_on_both_checkpoints() -> None:
    """`benchmarks/quality.py` scores every row on the LLaDA and on the Dream checkpoint, except
    those of block-wise models; each model's stored scores are those of its rules."""
    whole = {row.name for row in DECODINGS if not row.source.startswith(("SDAR", "Nemotron"))}
    assert rows_of([rule for _, _, rule in RULES]) == whole
    for model in MODELS.values():
        scored = [(score.family, score.label, score.params) for score in stored(model.name)]
        assert scored == model.rules


def test_all_are_compared_with_the_reference() -> None:
    """The requests of the parity tests select every row; Nemotron's has a test of its own."""
    elsewhere = {"remasking=low_confidence", "remasking=speculative"}
    assert (
        rows_of([dict(rule) for rule in cases.RULES]) >= {row.name for row in DECODINGS} - elsewhere
    )
