"""Structured outputs: the form of a text is held by construction."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from dllm_engine import LLM, InvalidRequest, Prompt, SamplingParams
from dllm_engine.structured.best_text import Span, best_classes, class_maxima
from dllm_engine.structured.byte_automaton import ByteAutomaton
from dllm_engine.structured.compiler import Compiler
from dllm_engine.structured.json_schema import expression_of
from dllm_engine.structured.patterns import whole_text
from dllm_engine.structured.token_automaton import TokenAutomaton
from dllm_engine.structured.vocabulary import Vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.budget import examples
from tests.support.checkpoints import EOS, MASK, write_dream, write_llada
from tests.support.family_checkpoints import write_family

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
}
LETTERS = {i: bytes([97 + i]) for i in range(4)} | {4: b"ab", 5: b"ca", 6: b"bc"}


def letters() -> Vocabulary:
    """Some short tokens of a, b, c and d, and two that end a text; none is fixed."""
    return Vocabulary(LETTERS, (7, 8), False, lambda _: [])


def texts_of(automaton: TokenAutomaton, length: int, slack: int) -> list[tuple[int, ...]]:
    """Try all: strings of `length` tokens that leave at most `slack` to the next end."""
    found = []
    for tokens in itertools.product(range(9), repeat=length):
        state = automaton.start
        for token in tokens:
            label = automaton.class_of[token]
            state = -1 if label == automaton.delta.shape[1] else automaton.delta[state, label]
            if state < 0:
                break
        else:
            if automaton.distance[state] <= slack:
                found.append(tokens)
    return found


@settings(deadline=None, max_examples=examples(24))
@given(
    expression=st.sampled_from(["(ab|c)*d", "a{1,3}b?", "[abc]+", "d|ca?b*", "(a|b)(c|d)a*"]),
    length=st.integers(1, 4),
    slack=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_the_best_text_is_that_of_trying_all(
    expression: str, length: int, slack: int, seed: int
) -> None:
    """The dynamic programme finds the string of the largest sum, also around decided tokens."""
    automaton = TokenAutomaton.of(ByteAutomaton.of(expression), letters(), 9)
    possible = texts_of(automaton, length, slack)
    if not possible:
        return
    random = np.random.default_rng(seed)
    scores = random.normal(size=(length, 9))
    decided = possible[random.integers(len(possible))]
    keeps = random.random(length) < 0.3
    matching = [t for t in possible if all(t[i] == decided[i] for i in keeps.nonzero()[0])]
    best = max(matching, key=lambda t: sum(scores[i, t[i]] for i in (~keeps).nonzero()[0]))

    tokens = np.where(keeps, decided, -1)
    rows = scores[~keeps]
    other = Span(automaton, automaton.start, np.full(length, -1), slack)
    spans = [Span(automaton, automaton.start, tokens, slack), other]
    maxima = np.concatenate([class_maxima(rows, automaton), class_maxima(scores, automaton)])
    labels = best_classes(spans, maxima)[: len(rows)]
    members = [automaton.tokens_of(int(label)) for label in labels]
    found = [int(m[row[m].argmax()]) for m, row in zip(members, rows, strict=True)]
    assert found == [best[i] for i in (~keeps).nonzero()[0]]


SCHEMAS: list[Any] = [
    PERSON,
    {"type": "integer", "minimum": -37, "exclusiveMaximum": 1204},
    {"type": "number", "minimum": -0.25, "maximum": 3},
    {"type": "number", "exclusiveMinimum": 0},
    {"type": "integer", "multipleOf": 7, "minimum": 3, "maximum": 60},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "string", "pattern": '^[^a-y"]{2}\\d+$'},
    {"type": "string", "pattern": "^a.b|^é"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "ipv4"},
    {"enum": ['a"b', 1.5, None, [1, {"x": "\n"}]]},
    {"type": ["string", "null"], "maxLength": 1},
    {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    {"oneOf": [{"type": "string", "maxLength": 1}, {"type": "integer", "maximum": 3}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {
        "type": "array",
        "prefixItems": [{"const": 1}, {"type": "null"}],
        "minItems": 2,
        "maxItems": 3,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {
        "type": "object",
        "patternProperties": {"^x": {"type": "null"}},
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"a": {"const": 1}, "b": True, "c": {"const": 2}}},
    {
        "type": "object",
        "required": ["xy"],
        "patternProperties": {"^x": {"type": "integer"}, "y$": {"minimum": 3}},
    },
    {
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
        "$ref": "#/$defs/node",
    },
]


def is_valid(text: str, schema: Any) -> bool:
    """Whether an independent validator accepts the text."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return bool(
        jsonschema.Draft202012Validator(schema, format_checker=checker).is_valid(json.loads(text))
    )


def walk(automaton: ByteAutomaton, random: np.random.Generator) -> str:
    """A random text of an automaton over bytes."""
    state, text = automaton.start, bytearray()
    while not (automaton.accepting[state] and random.random() < 0.3):
        following = (automaton.delta[state] >= 0).nonzero()[0]
        if not len(following):
            break
        text.append(int(random.choice(following)))
        state = int(automaton.delta[state, text[-1]])
    return text.decode()


@pytest.mark.parametrize(
    "schema",
    [*SCHEMAS[:7], *(pytest.param(schema, marks=pytest.mark.slow) for schema in SCHEMAS[7:])],
    ids=lambda schema: json.dumps(schema)[:40],
)
def test_all_texts_of_a_schema_are_valid(schema: Any) -> None:
    """An independent validator accepts whatever an automaton of a schema lets through."""
    automaton = ByteAutomaton.of(expression_of(schema, 1000))
    random = np.random.default_rng(1)
    for _ in range(25):
        text = walk(automaton, random)
        assert is_valid(text, schema), text


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, r"\$\.a has not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "object", "dependentRequired": {}}, "dependentRequired"),
        ({"type": "string", "format": "idn-email"}, "format"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "maxLength"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"$ref": "https://example.com/x"}, "ref"),
        ({"$ref": "#/$defs/x"}, "not there"),
        ({"type": "string", "enum": [1]}, "allows nothing"),
        (False, "allows nothing"),
        ({"type": "thing"}, "type"),
        ({"minLength": -1, "type": "string"}, "minLength"),
        # Values of another type or size than JSON Schema's.
        ({"type": "integer", "minimum": 10**400}, "well-formed"),
        ({"type": "string", "maxLength": float("inf")}, "well-formed"),
        ({"const": float("nan")}, "well-formed"),
        ({"allOf": [{"minimum": 1}, {"minimum": "x"}]}, r"allOf\[1\] has minimum"),
        ({"oneOf": [{"type": 5}, {"type": 6}]}, "well-formed"),
        # Merging these would allow what one of both does not.
        ({"additionalProperties": False, "allOf": [{"properties": {"a": {}}}]}, "properties"),
        ({"allOf": [{"prefixItems": [{}]}, {"items": {"type": "null"}}]}, "prefixItems"),
        ({"allOf": [{"$ref": "#/$defs/a", "maxLength": 2}], "$defs": {"a": {}}}, "ref"),
        ({"allOf": [{"const": 1}, {"const": True}]}, "const"),
        ({"enum": [[1]], "const": [True]}, "allows nothing"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(schema: Any, words: str) -> None:
    """No keyword is left out: the error has its name and its path."""
    with pytest.raises(InvalidRequest, match=words):
        expression_of(schema, 1000)


def nested(levels: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": 2, "maxItems": 9}
    return schema


@pytest.mark.slow
@pytest.mark.parametrize(
    "wanted",
    [
        {"json": nested(12)},
        {"json": nested(200)},
        {"regex": "(a|b)*a(a|b){20}"},
        {"regex": "a{99999}"},
    ],
    ids=["wide", "deep", "exponential", "long"],
)
def test_a_hostile_form_is_refused(wanted: Mapping[str, Any]) -> None:
    """A form that would need too much time or memory is an error of the request."""
    with pytest.raises(InvalidRequest, match="too large|too deep|levels"):
        Compiler(letters(), 9).automaton(wanted, 100)


@pytest.mark.parametrize(
    "expression", [r"\d{3}-[^a-c]+", r"(yes|no)!?", r"^[\w.]+@x\.com$", r"a.c\s*", "é|ß{2}"]
)
def test_texts_of_an_expression_match_in_python(expression: str) -> None:
    """What an automaton of a regular expression lets through, `re.fullmatch` accepts."""
    automaton = ByteAutomaton.of(whole_text(expression))
    random = np.random.default_rng(2)
    for _ in range(40):
        text = walk(automaton, random)
        assert re.fullmatch(expression, text), text


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(write_llada(tmp_path_factory.mktemp("llada")), dtype="float32")


def parsed(text: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a text has the form, by independent means."""
    if "json" in wanted:
        return is_valid(text, wanted["json"])
    if "regex" in wanted:
        return re.fullmatch(wanted["regex"], text) is not None
    if "choice" in wanted:
        return text in wanted["choice"]
    return isinstance(json.loads(text), dict)


FORMS: list[dict[str, Any]] = [
    {"json": PERSON},
    {"json": SCHEMAS[12]},
    {"choice": ["yes", "no", "yes, of course"]},
    {"regex": r"[A-C]{2}\d*"},
    {"json_object": True},
]
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 2.0, "top_k": 3},
    {"temperature": 0.5, "top_p": 0.3, "cfg_scale": 1.0},
    {"confidence_threshold": 0.05, "block_length": 8},
    {"factor": 2.0, "temperature": 1.5},
    {"entropy_bound": 6.0},
    {"anchor_threshold": 0.2, "neighbor_threshold": 0.05},
    {"remasking": "random", "steps": 12},
    {"remasking": "margin", "confidence_eos_eot_inf": True},
    {"alg": "origin", "steps": 9},
    {"alg": "entropy", "alg_temp": 0.5, "temperature": 1.0, "top_p": 0.9},
]


@st.composite
def requests(draw: st.DrawFn, caches: tuple[str, ...], rules: bool) -> SamplingParams:
    choice = draw(st.sampled_from(SAMPLINGS)) if rules else {}
    if not rules:
        choice = {"temperature": draw(st.sampled_from([0.0, 1.0, 2.0]))}
    return SamplingParams(
        gen_length=draw(st.integers(40, 64)),
        structured_outputs=draw(st.sampled_from(FORMS)),
        seed=draw(st.integers(0, 9999)),
        cache=draw(st.sampled_from(caches)),
        ignore_eos=draw(st.booleans()),
        **choice,
    )


def check_all(llm: LLM, batch: list[SamplingParams]) -> None:
    prompts = [Prompt([1, 2, 3 + i]) for i in range(len(batch))]
    answers = llm.generate(prompts, batch, progress=False)
    for params, answer in zip(batch, answers, strict=True):
        assert params.structured_outputs is not None
        assert parsed(answer.text, params.structured_outputs), (answer.text, params)
        assert answer.finish_reason == "stop"


OTHERS = ("dream", "illada", "fast_dllm", "nemotron")
CACHES = ("none", "prefix", "dual", "sparse", "delayed")


@settings(deadline=None, max_examples=examples(6))
@given(batch=st.lists(requests(CACHES, rules=True), min_size=4, max_size=4))
def test_every_answer_has_its_form_and_ends(llada: LLM, batch: list[SamplingParams]) -> None:
    """With any rule, temperature, filter and cache, an answer has its form and is complete."""
    check_all(llada, batch)


@pytest.mark.parametrize(
    "family",
    ["sdar", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)],
)
def test_every_family_holds_forms(tmp_path: Path, family: str) -> None:
    """Block-wise families carry the state from block to block."""
    write = write_dream if family == "dream" else partial(write_family, family=family)
    llm = LLM(write(tmp_path), dtype="float32")
    caches = ("none", "block") if llm.engine.spec.blocks else CACHES

    @settings(deadline=None, max_examples=examples(3), database=None)
    @given(batch=st.lists(requests(caches, rules=False), min_size=4, max_size=4))
    def check(batch: list[SamplingParams]) -> None:
        check_all(llm, batch)

    check()


def test_a_form_is_the_same_in_any_batch(llada: LLM) -> None:
    """Tokens of a request with a form do not depend on the others of the batch."""
    batch = [
        SamplingParams(gen_length=40, seed=i, structured_outputs=form, **sampling)
        for i, (form, sampling) in enumerate(zip([*FORMS[1:], None], SAMPLINGS[1:6], strict=True))
    ]
    prompts = [Prompt([5, 6, i]) for i in range(len(batch))]
    together = llada.generate(prompts, batch, progress=False)
    for prompt, params, answer in zip(prompts, batch, together, strict=True):
        (alone,) = llada.generate([prompt], params, progress=False)
        assert alone.token_ids.tolist() == answer.token_ids.tolist()


def test_a_form_that_allows_all_changes_nothing(llada: LLM) -> None:
    """Greedy and sampled tokens are the free ones where the free text has the form."""
    for temperature in (0.0, 1.0):
        free = SamplingParams(gen_length=24, seed=4, temperature=temperature, ignore_eos=True)
        (plain,) = llada.generate([Prompt([1, 2])], free, progress=False)
        choice = {"choice": [plain.text]}
        held = SamplingParams(
            gen_length=24, seed=4, temperature=temperature, structured_outputs=choice
        )
        if "\ufffd" in plain.text or not plain.text:
            continue
        (answer,) = llada.generate([Prompt([1, 2])], held, progress=False)
        assert answer.text == plain.text


def test_fixed_tokens_cost_no_step(llada: LLM) -> None:
    """What the form leaves no choice of is committed without a step: keys, and the end."""
    fixed = SamplingParams(gen_length=32, structured_outputs={"choice": ["one way only"]})
    (answer,) = llada.generate([Prompt([1])], fixed, progress=False)
    assert answer.text == "one way only"
    assert answer.usage.steps <= 1
    keys = {"type": "object", "properties": {"answer": {"type": "boolean"}}, "required": ["answer"]}
    held = SamplingParams(gen_length=32, structured_outputs={"json": keys})
    (answer,) = llada.generate([Prompt([1])], held, progress=False)
    assert answer.usage.steps <= len("false")
    # Behind the longest text there are only end tokens.
    assert answer.token_ids[len('{"answer":false}') + 1 :].tolist() == [EOS] * 15


def test_text_around_a_form_is_fixed(llada: LLM) -> None:
    """`prefix` and `suffix` stand before and behind the text."""
    wanted = {"json": {"type": "integer"}, "prefix": "<call>\n", "suffix": "\n</call>"}
    params = SamplingParams(gen_length=48, structured_outputs=wanted)
    (answer,) = llada.generate([Prompt([1])], params, progress=False)
    assert re.fullmatch("<call>\n-?[0-9]+\n</call>", answer.text)


def test_a_text_that_is_too_long_is_refused_with_both_numbers(llada: LLM) -> None:
    """The error has the tokens of the shortest text, and gen_length."""
    params = SamplingParams(gen_length=4, structured_outputs={"json": PERSON})
    with pytest.raises(InvalidRequest, match="shortest text has [0-9]+ tokens; gen_length is 4"):
        llada.generate([Prompt([1])], params, progress=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "exactly one"),
        ({"structured_outputs": {"grammar": "x"}}, "grammar"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"choice": ["a"]}, "stop": ("x",)}, "stop"),
        ({"structured_outputs": {"choice": ["a"]}, "logits_eos_inf": True}, "logits_eos_inf"),
        (
            {"structured_outputs": {"choice": ["a"]}, "credit": True, "confidence_threshold": 0.5},
            "credit",
        ),
    ],
)
def test_what_a_form_excludes_is_refused(llada: LLM, fields: dict[str, Any], words: str) -> None:
    """A field that cannot be honoured together with a form is named."""
    with pytest.raises(InvalidRequest, match=words):
        llada.generate([Prompt([1])], SamplingParams(**fields), progress=False)


def test_given_tokens_are_refused_beside_a_form(llada: LLM) -> None:
    """A canvas or suffix of the caller's own cannot be combined with a form."""
    params = SamplingParams(gen_length=2, structured_outputs={"choice": ["a"]})
    for prompt in (Prompt([1], [MASK, 3]), Prompt([1], [], [4])):
        with pytest.raises(InvalidRequest, match="cannot be combined"):
            llada.generate([prompt], params, progress=False)


def test_vocabularies_are_read_as_bytes() -> None:
    """A decoder that drops a leading space may write one before the text."""
    words = {0: b" a", 1: b"a", 2: b" ", 3: b"b"}
    for strips, first in ((True, {0, 1, 2}), (False, {1})):
        vocabulary = Vocabulary(words, (4,), strips, lambda _: [])
        automaton = TokenAutomaton.of(ByteAutomaton.of("a|ab"), vocabulary, 5)
        row = automaton.delta[automaton.start]
        allowed = {
            t for t in words if automaton.class_of[t] < len(row) and row[automaton.class_of[t]] >= 0
        }
        assert allowed == first
