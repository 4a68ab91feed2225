"""What happens to requests inside the engine: ends, limits, updates."""

import dataclasses
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dllm_engine import (
    LLM,
    CheckpointError,
    EngineConfig,
    FinishReason,
    InvalidConfig,
    InvalidRequest,
    Prompt,
    QueueTimeout,
    SamplingParams,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.checkpoints import BOS, EOS, EOT, MASK, write_llada
from tests.support.engines import PROMPT, make_engine, run, submit
from tests.support.reference import Forward

CREDIT: dict[str, object] = {"credit": True, "confidence_threshold": 0.9}


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose likeliest first token for `PROMPT` is an end-of-text token."""
    directory = write_llada(tmp_path_factory.mktemp("eager"))
    free = LLM(directory).generate(
        [PROMPT], SamplingParams(gen_length=16, block_length=4, ignore_eos=True), progress=False
    )[0]
    config = json.loads((directory / "config.json").read_text())
    config["eos_token_id"] = int(free.token_ids[6])  # in the second block of four
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_an_end_of_text_token_ends_the_request_early(eager: Path) -> None:
    """EOS ends a request as soon as everything before it is decoded; the text stops before it."""
    llm = LLM(eager)
    params = SamplingParams(gen_length=16, block_length=4)
    stopped = llm.generate([PROMPT], params, progress=False)[0]
    whole = llm.generate([PROMPT], dataclasses.replace(params, ignore_eos=True), progress=False)[0]
    eos = llm.engine.stop_token_ids
    first = next(i for i, token in enumerate(whole.token_ids) if int(token) in eos)
    assert stopped.finish_reason is FinishReason.STOP
    assert whole.finish_reason is FinishReason.LENGTH
    assert stopped.token_ids[: first + 1].tolist() == whole.token_ids[: first + 1].tolist()
    assert stopped.usage.completion_tokens == first + 1
    assert stopped.usage.steps <= 8 < whole.usage.steps == 16
    assert (stopped.token_ids[8:] == MASK).all()
    assert (stopped.confidence[8:] == -1).all()
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    assert stopped.text == tokenizer.decode(whole.token_ids[:first])


def test_end_of_turn_tokens_of_the_tokenizer_end_a_request_too(checkpoint: Path) -> None:
    """`<|eot_id|>` ends a turn although config.json names `<|endoftext|>` alone."""
    assert set(make_engine(checkpoint).stop_token_ids) == {EOS, EOT}


def test_a_stop_string_ends_the_request_and_is_not_part_of_the_text(llm: LLM) -> None:
    """Decoding ends once the stop string stands in the finished prefix."""
    params = SamplingParams(gen_length=24, block_length=4, ignore_eos=True)
    free = llm.generate([PROMPT], params, progress=False)[0]
    stop = free.text[5:8]
    cut = llm.generate([PROMPT], dataclasses.replace(params, stop=("never", stop)), progress=False)
    assert cut[0].text == free.text[: free.text.index(stop)]
    assert cut[0].finish_reason is FinishReason.STOP
    assert cut[0].usage.steps < free.usage.steps


def test_a_stop_string_ends_the_count_of_tokens(llm: LLM) -> None:
    """Tokens are counted up to the one that completes it, however many came in the same step."""
    params = SamplingParams(gen_length=24, steps=1, ignore_eos=True)
    whole = llm.generate([PROMPT], params, progress=False)[0]
    stop = whole.text[3:6]
    cut = llm.generate([PROMPT], dataclasses.replace(params, stop=(stop,)), progress=False)[0]
    assert llm.engine.tokenizer is not None
    decoded = [llm.engine.tokenizer.decode(whole.token_ids[:count]) for count in range(25)]
    assert (whole.usage.completion_tokens, cut.text) == (24, whole.text[: whole.text.index(stop)])
    assert cut.usage.completion_tokens == next(n for n in range(25) if stop in decoded[n])


def test_cancelling_frees_the_slot_at_once(checkpoint: Path) -> None:
    """A cancelled request ends with what it has; the next takes its slot in the next step."""
    engine = make_engine(checkpoint, max_num_seqs=1)
    first, second = submit(engine, gen_length=20), submit(engine, gen_length=2)
    for _ in range(3):
        engine.step()
    update = engine.cancel(first)
    assert update is not None
    assert update.finish_reason is FinishReason.CANCELLED
    assert int((update.confidence >= 0).sum()) == update.usage.steps == 3
    assert engine.cancel(first) is None
    assert set(run(engine)) == {second}
    waiting, _ = submit(engine, gen_length=2), submit(engine, gen_length=2)
    assert engine.cancel(waiting) is not None
    assert len(run(engine)) == 1


def test_updates_come_every_step_and_committed_tokens_never_change(checkpoint: Path) -> None:
    """With an interval of 0: one update per step; each shows all earlier commits unchanged."""
    engine = make_engine(checkpoint)
    params = SamplingParams(gen_length=12, block_length=4, ignore_eos=True)
    engine.add(engine.make_request(Prompt(PROMPT), params, stream_interval=0.0))
    updates = [update for _ in range(12) for update in engine.step()]
    assert [u.usage.steps for u in updates] == list(range(1, 13))
    assert [u.finished for u in updates] == [False] * 11 + [True]
    for before, after in itertools.pairwise(updates):
        committed = before.confidence >= 0
        assert (after.confidence[committed] == before.confidence[committed]).all()
        assert (after.token_ids[committed] == before.token_ids[committed]).all()
        assert before.num_ready <= after.num_ready


def test_updates_can_be_spaced_or_left_out(checkpoint: Path) -> None:
    """A long interval, or none, leaves only the final update."""
    engine = make_engine(checkpoint)
    for interval, expected in ((0.0, 8), (3600.0, 1), (None, 1)):
        params = SamplingParams(gen_length=8, ignore_eos=True)
        engine.add(engine.make_request(Prompt(PROMPT), params, stream_interval=interval))
        updates = []
        while engine.has_work:
            updates += engine.step()
        assert len(updates) == expected


def test_who_waits_gives_signs_of_life_and_gives_up_in_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request without a place sends updates too, all masks, until it has waited enough."""
    clock = time.monotonic()
    monkeypatch.setattr("dllm_engine.loop.engine.time.monotonic", lambda: clock)
    engine = make_engine(checkpoint, max_num_seqs=1)
    params = SamplingParams(gen_length=40, ignore_eos=True)
    running, waiting, late = (
        engine.make_request(Prompt(PROMPT), params, stream_interval=interval, timeout=timeout)
        for interval, timeout in ((None, 2.0), (3.0, None), (None, 7.0))
    )
    for request in (running, waiting, late):
        engine.add(request)
    seen = []
    for _ in range(10):
        clock += 1.0
        seen += [(round(clock - waiting.queued_at), update) for update in engine.step()]
    assert [(when, update.request_id) for when, update in seen] == [
        (3, waiting.request_id),
        (6, waiting.request_id),
        (8, late.request_id),
        (9, waiting.request_id),
    ]
    assert seen[0][1].finish_reason is None
    assert set(seen[0][1].token_ids.tolist()) == {engine.spec.mask_token_id}
    assert isinstance(seen[2][1].error, QueueTimeout)
    assert "7 s" in str(seen[2][1].error)
    assert (len(engine.scheduler.running), len(engine.scheduler.waiting)) == (1, 1)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", -0.1, "0 to 1000000"),
        ("temperature", float("nan"), "0 to 1000000"),
        ("temperature", float("inf"), "0 to 1000000"),
        ("gen_length", 0, "at least 1"),
        ("gen_length", 254, "at most 256"),
        ("gen_length", 10_000, "at most 256"),
        ("steps", 0, "at least 1"),
        ("steps", 1, "at least the number of blocks, 2"),
        ("block_length", 0, "at least 1"),
        ("block_length", 65, r"1 to gen_length \(64\)"),
        ("cfg_scale", -1.0, "0 to 1000"),
        ("steps", 10_000, "at most 256"),
        (
            "remasking",
            "best",
            "low_confidence, random, entropy, margin, sequential, speculative; got 'best'",
        ),
        ("factor", -0.1, "0 to 1000000"),
        ("entropy_bound", float("nan"), "0 to 1000000"),
        ("low_threshold", 0.5, "needs confidence_threshold"),
        ("neighbor_threshold", 0.5, "needs anchor_threshold"),
        ("anchor_threshold", 0.0, "above 0 and at most 1"),
        ("alg", "best", "origin, maskgit_plus, topk_margin, entropy; got 'best'"),
        ("alg_temp", 0.5, "0 without alg"),
        ("confidence_threshold", 0.0, "above 0 and at most 1"),
        ("confidence_threshold", 1.1, "above 0 and at most 1"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_k", 0, "at least 1"),
        ("cfg_scale", 1e38, "0 to 1000"),
        ("seed", 2**63, "-9223372036854775808 to 9223372036854775807"),
        ("stop", ("",), "1 to 256 characters"),
        ("stop", ("x",) * 17, "at most 16 strings"),
        ("stop", "END", "a tuple of strings; got 'END'"),
        ("cache", "huge", "none, prefix, dual, sparse, delayed"),
        ("retention_ratio", 0.5, "sparse; got cache none"),
        ("retention_ratio", 0.0, "above 0 and at most 1"),
        ("pool_kernel", 2, "odd"),
        ("credit", True, "needs confidence_threshold"),
        ("delay_steps", -1, "at least 0"),
        ("refresh_interval", 4, "prefix, dual, sparse, delayed; got cache none"),
    ],
)
def test_bad_parameters_are_refused_by_field_and_limit(
    llm: LLM, field: str, value: object, limit: str
) -> None:
    """Every parameter out of range is an InvalidRequest that names the field and the limit."""
    params = SamplingParams(**({"gen_length": 64} | {field: value}))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=f"^{field}: .*{limit}") as raised:
        llm.engine.make_request(Prompt(PROMPT), params)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"confidence_threshold": 0.9, "factor": 1.0}, "factor: .*with confidence_threshold"),
        ({"entropy_bound": 0.1, "anchor_threshold": 0.9}, "anchor_threshold: .*entropy_bound"),
        ({"alg": "entropy", "confidence_threshold": 0.9}, "confidence_threshold: .*with alg"),
        (CREDIT | {"alg": "entropy"}, "credit: .*with alg"),
        (CREDIT | {"temperature": 0.5}, "credit: .*with temperature"),
        (CREDIT | {"confidence_eos_eot_inf": True}, "credit: .*with confidence_eos_eot_inf"),
    ],
    ids=str,
)
def test_contradicting_rules_are_refused(llm: LLM, params: dict[str, object], message: str) -> None:
    """Only one parameter may say how many positions a step commits."""
    with pytest.raises(InvalidRequest, match=message):
        llm.engine.make_request(Prompt(PROMPT), SamplingParams(**params))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([512], r"0\.\.511; got 512"), ([-1], r"0\.\.511; got -1")],
)
def test_bad_prompts_are_refused(llm: LLM, prompt: list[int], message: str) -> None:
    """Ids outside the vocabulary name `input_ids` and the limit."""
    with pytest.raises(InvalidRequest, match=f"^input_ids: .*{message}"):
        llm.engine.make_request(Prompt(prompt), SamplingParams())


def test_the_last_token_of_the_context_can_be_used(llm: LLM) -> None:
    """Prompt plus canvas may fill the context exactly."""
    params = SamplingParams(gen_length=250, block_length=250, steps=2, ignore_eos=True)
    answer = llm.generate([[1] * 6], params, progress=False)[0]
    assert (answer.confidence >= 0).all()


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    """A text, token ids or a conversation alone is one prompt; messages use the chat template."""

    def tokens(prompts: Any, **options: Any) -> list[list[int]]:
        params = SamplingParams(gen_length=8)
        answers = llm.generate(prompts, params, progress=False, **options)
        return [answer.token_ids.tolist() for answer in answers]

    messages = [{"role": "user", "content": "hi"}]
    assert tokens("hello") == tokens(["hello"])
    assert tokens([1, 2, 3]) == tokens(Prompt([1, 2, 3])) == tokens([[1, 2, 3]])
    assert tokens(messages) == tokens([messages]) == tokens("hi", chat=True)
    assert len(tokens([messages, "hello", [1, 2]])) == 3
    ids = np.array([[1, 2, 3]])
    for same in (ids, ids[0], [ids[0]], list(ids[0]), torch.tensor([1, 2, 3])):
        assert tokens(same) == tokens([1, 2, 3])


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        (None, "NoneType"),
        ({"role": "user", "content": "a"}, "dict"),
        ([None], "NoneType"),
        ([1.5], "float"),
        ([[True]], "bool"),
        ([["a"]], "str"),
        ([1, "a"], "str"),
        ([b"a"], "bytes"),
        (np.array([0.5]), "float"),
        ([[{"role": "user", "content": "a"}, 1]], ""),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(llm: LLM, prompts: Any, found: str) -> None:
    """What is neither a text nor messages nor integers is told so, with what it is."""
    with pytest.raises(InvalidRequest, match=f"^prompts: a prompt must be .*{found}"):
        llm.generate(prompts, progress=False)


def test_calls_on_several_threads_get_their_own_answers(llm: LLM) -> None:
    """Each call returns the completions of its own prompts, as if it were alone."""

    def answer(seed: int) -> list[list[int]]:
        params = SamplingParams(gen_length=12, temperature=1.0, ignore_eos=True, seed=seed)
        found = llm.generate([[1, 2, seed]] * 2, params, progress=False)
        return [completion.token_ids.tolist() for completion in found]

    seeds = range(1, 5)
    alone = [answer(seed) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        assert list(pool.map(answer, seeds)) == alone


def test_a_checkpoint_without_a_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    """Token ids in, token ids out; text and stop strings are refused by name."""
    llm = LLM(write_llada(tmp_path, tokenizer=False))
    answer = llm.generate([PROMPT], SamplingParams(gen_length=4, ignore_eos=True), progress=False)
    assert answer[0].text == ""
    assert len(answer[0].token_ids) == 4
    with pytest.raises(InvalidRequest, match="^prompts: .*no tokenizer"):
        llm.generate(["text"])
    with pytest.raises(InvalidRequest, match="^stop: .*no tokenizer"):
        llm.generate([PROMPT], SamplingParams(stop=("a",)))


@pytest.mark.parametrize("suffix", [[20, 21], []])
def test_fixed_tokens_in_the_canvas_and_behind_it_stay(
    llm64: LLM, oracle64: Forward, suffix: list[int]
) -> None:
    """A gap is filled in view of what surrounds it; fixed tokens are never written, and an end
    among them ends nothing.

    The only masked position left must get what one forward pass over the whole sequence says.
    """
    canvas = [7, MASK, 9, EOS, 11]
    prompt = Prompt(PROMPT, canvas_ids=canvas, suffix_ids=suffix)
    answer = llm64.generate([prompt], SamplingParams(gen_length=5), progress=False)[0]
    logits = oracle64(torch.tensor([*PROMPT, *canvas, *suffix]))[4].clone()
    logits[MASK] = -torch.inf
    filled = int(logits.argmax())
    assert answer.token_ids.tolist() == [7, filled, 9, EOS, 11]
    assert answer.usage.steps == 1
    assert answer.usage.prompt_tokens == 3 + len(suffix)
    assert answer.finish_reason is FinishReason.LENGTH
    assert (answer.confidence >= 0).tolist() == [False, True, False, False, False]


def test_a_suffix_changes_the_answer_and_is_no_part_of_it(llm: LLM) -> None:
    """The canvas is decoded in view of the suffix; blocks and steps are those of the canvas."""
    params = SamplingParams(gen_length=12, block_length=5, steps=7, ignore_eos=True)
    plain, gap = llm.generate(
        [PROMPT, Prompt(PROMPT, suffix_ids=[40, 41, 42])], params, progress=False
    )
    assert len(gap.token_ids) == 12
    assert gap.usage.steps == plain.usage.steps == 7
    assert gap.token_ids.tolist() != plain.token_ids.tolist()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            Prompt(PROMPT, canvas_ids=[1, MASK]),
            r"canvas_ids: must hold gen_length \(3\) ids; got 2",
        ),
        (Prompt(PROMPT, canvas_ids=[1, 2, 3]), "canvas_ids: holds no mask"),
        (Prompt(PROMPT, canvas_ids=[1, MASK, 512]), r"canvas_ids: .*0\.\.511"),
        (Prompt(PROMPT, suffix_ids=[1] * 251), "gen_length: prompt .254 tokens."),
    ],
    ids=str,
)
def test_bad_gaps_are_refused(llm: LLM, prompt: Prompt, message: str) -> None:
    """A canvas of the wrong length, without masks or with bad ids is named."""
    with pytest.raises(InvalidRequest, match=message):
        llm.engine.make_request(prompt, SamplingParams(gen_length=3))


def test_one_bad_prompt_stops_the_whole_call_before_it_runs(llm: LLM) -> None:
    """`LLM.generate` checks everything first; nothing is left behind in the engine."""
    with pytest.raises(InvalidRequest):
        llm.generate([PROMPT, [9999]])
    with pytest.raises(InvalidRequest, match="params: 2 given for 1"):
        llm.generate([PROMPT], [SamplingParams()] * 2)
    assert not llm.engine.has_work


def test_settings_come_from_strings_and_are_checked(checkpoint: Path) -> None:
    """The server's settings parse by type; unknown, malformed and impossible ones are named."""
    base = {"MODEL_PATH": str(checkpoint)}
    config = EngineConfig.from_mapping(base | {"DLLM_MAX_NUM_SEQS": "3", "DLLM_DTYPE": ""})
    assert (config.max_num_seqs, config.dtype) == (3, "auto")
    for settings, message in (
        ({}, "MODEL_PATH: missing"),
        (base | {"DLLM_SPEED": "9"}, "unknown setting DLLM_SPEED"),
        (base | {"DLLM_MAX_NUM_SEQS": "many"}, "DLLM_MAX_NUM_SEQS: must be a whole number"),
        (base | {"DLLM_MAX_NUM_SEQS": "0"}, "DLLM_MAX_NUM_SEQS: must be at least 1"),
        (base | {"DLLM_DTYPE": "int8"}, "DLLM_DTYPE: must be one of"),
        (base | {"DLLM_KERNELS": "cuda"}, "DLLM_KERNELS: must be one of auto, torch, triton"),
        (base | {"DLLM_BATCH_INVARIANT": "2"}, "DLLM_BATCH_INVARIANT: must be on or off"),
        (base | {"DLLM_CUDA_GRAPH_ROWS": "-1"}, "DLLM_CUDA_GRAPH_ROWS: must be at least 0"),
        (base | {"DLLM_STEP_TIMEOUT": "-1"}, "DLLM_STEP_TIMEOUT: must be at least 0, or empty"),
        (base | {"DLLM_STEP_TIMEOUT": "inf"}, "DLLM_STEP_TIMEOUT: must be at least 0, or empty"),
        (base | {"DLLM_STEP_TIMEOUT": "nan"}, "DLLM_STEP_TIMEOUT: must be at least 0, or empty"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            EngineConfig.from_mapping(settings)
    assert make_engine(checkpoint).runner.step_timeout == 3600
    assert make_engine(checkpoint, step_timeout=0.0).runner.step_timeout == 0
    with pytest.raises(InvalidConfig, match="DLLM_MAX_MODEL_LEN: .* 256 tokens"):
        make_engine(checkpoint, max_model_len=257)
    with pytest.raises(InvalidConfig, match="DLLM_DEVICE"):
        make_engine(checkpoint, device="cuda")
    with pytest.raises(InvalidConfig, match="DLLM_CUDA_GRAPH_ROWS: graphs need kernels .* on cpu"):
        make_engine(checkpoint, device="cpu", cuda_graph_rows=64)
    with pytest.raises(InvalidConfig, match="DLLM_KERNELS: triton has no kernels for float64"):
        make_engine(checkpoint, device="cpu", kernels="triton", dtype="float64")
    with pytest.raises(CheckpointError, match="no such directory"):
        make_engine(checkpoint / "none")


def test_priority_decides_who_steps_when_the_budget_is_short(checkpoint: Path) -> None:
    """With room for one sequence per step, a request of level 1 is done before one of level 3."""
    engine = make_engine(checkpoint, max_num_batched_tokens=12)
    params = SamplingParams(gen_length=8, ignore_eos=True)
    late, early = (engine.make_request(Prompt(PROMPT), params, priority=level) for level in (3, 1))
    engine.add(late)
    engine.add(early)
    order = []
    while engine.has_work:
        order += [update.request_id for update in engine.step()]
    assert order == [early.request_id, late.request_id]
    assert late.steps_run == early.steps_run == 8


def test_sequences_larger_than_the_budget_are_served_and_so_are_those_behind(
    checkpoint: Path,
) -> None:
    """A budget smaller than every sequence slows all requests down and stops none."""
    prompts = [[1] * 40, [2] * 5, [3] * 40, [4] * 5]
    params = SamplingParams(gen_length=12, ignore_eos=True)
    roomy, narrow = LLM(checkpoint), LLM(checkpoint, max_num_batched_tokens=16)
    expected = roomy.generate(prompts, params, progress=False)
    found = narrow.generate(prompts, params, progress=False)
    assert [a.token_ids.tolist() for a in found] == [a.token_ids.tolist() for a in expected]
    assert narrow.engine.stats.steps == 4 * 12


class Operations(TorchDispatchMode):
    """Counts the tensor operations inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        self.count += 1
        return func(*args, **(kwargs or {}))  # type: ignore[operator,dict-item]


@pytest.mark.parametrize("cache", ["none", "dual", "delayed", "sparse"])
def test_a_step_takes_no_more_operations_for_more_requests(checkpoint: Path, cache: str) -> None:
    """Twenty requests are a step's tensor operations as often as two: nothing loops over them."""
    engine = make_engine(checkpoint, cache=cache)
    params = SamplingParams(gen_length=16, block_length=8, ignore_eos=True)
    counts = []
    for requests in (2, 20):
        for _ in range(requests):
            engine.add(engine.make_request(Prompt(PROMPT), params))
        engine.step()  # lays the canvases out, one by one
        engine.step()
        with Operations() as operations:
            engine.step()
        counts.append(operations.count)
        run(engine)
    assert counts[0] == counts[1]


def test_a_prompt_without_ids_is_the_start_token(checkpoint: Path, tmp_path: Path) -> None:
    """It is put before the canvas; a checkpoint that names none needs at least one id."""
    request = make_engine(checkpoint).make_request(Prompt([]), SamplingParams())
    assert request.prompt.ids == [BOS]
    config = write_llada(tmp_path) / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["bos_token"]
    config.write_text(json.dumps(settings))
    with pytest.raises(InvalidRequest, match="^input_ids: must not be empty: .* no start token"):
        make_engine(tmp_path).make_request(Prompt([]), SamplingParams())
