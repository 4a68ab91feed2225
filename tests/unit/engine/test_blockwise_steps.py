"""What a step of a block-wise model computes, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
from dllm_engine import LLM, Engine, EngineConfig, InvalidConfig, InvalidRequest, Prompt
from dllm_engine import SamplingParams as Params

from tests.support.checkpoints import write_llada
from tests.support.engines import run, runner_of
from tests.support.family_checkpoints import write_family


@pytest.fixture(scope="module")
def sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDAR with blocks of 4."""
    return write_family(tmp_path_factory.mktemp("sdar"), "sdar")


def engine_of(directory: Path, **settings: Any) -> Engine:
    """An engine of its own, in float32."""
    return Engine(EngineConfig(model_path=directory, dtype="float32", **settings))


def test_a_step_computes_what_is_not_final(sdar: Path) -> None:
    """Rows: the prompt's whole blocks with the first active one, then the active block, and in the
    first step of the next block also the one before it."""
    engine = engine_of(sdar)
    params = Params(gen_length=6, ignore_eos=True, remasking="sequential")
    engine.add(engine.make_request(Prompt(list(range(1, 11))), params))
    rows = []
    while engine.has_work:
        before = engine.stats.batched_tokens
        engine.step()
        rows.append(engine.stats.batched_tokens - before)
    # Ten tokens are two blocks and a tail: 12 rows, then the block of the tail; then 8 and 4.
    assert rows == [12, 4, 8, 4, 4, 4]


def test_a_prompt_is_read_in_chunks_beside_other_requests(sdar: Path) -> None:
    """While a prompt of 400 tokens is read, no step exceeds the token budget, and a short request
    takes all of its steps."""
    engine = engine_of(sdar, max_num_batched_tokens=128)
    short = engine.make_request(Prompt([1, 2, 3]), Params(gen_length=8, ignore_eos=True))
    long = engine.make_request(Prompt([5] * 400), Params(gen_length=4, ignore_eos=True))
    engine.add(short)
    engine.add(long)
    finished = []
    while engine.has_work:
        before = engine.stats.batched_tokens
        finished += [update.request_id for update in engine.step() if update.finished]
        assert engine.stats.batched_tokens - before <= 128
    assert finished == [short.request_id, long.request_id]
    assert long.steps_run >= 400 // 32


def test_a_bound_reserves_no_table_of_its_length(tmp_path: Path) -> None:
    """With a context of 32,768, the table of canvases grows with what requests ask for, and credit
    is kept for one block."""
    directory = write_family(tmp_path, "sdar", max_position_embeddings=32_768)
    engine = engine_of(directory, max_num_seqs=64)
    table = runner_of(engine).table
    engine.add(engine.make_request(Prompt([1] * 40), Params(gen_length=8)))
    run(engine)
    assert table.tokens.shape == (64, 1024)
    long = engine.make_request(Prompt([1] * 40), Params(gen_length=20_000))
    engine.add(long)
    engine.step()
    assert 20_040 <= table.tokens.shape[1] < 32_768
    # 23 bytes a position, as is planned for the longest requests in all slots; 128 for credit.
    assert engine.runner.plan.requests < 64 * (23 * 32_768 + 128 * 256 + 1024)


@pytest.mark.parametrize(
    ("fields", "prompt", "message"),
    [
        ({"cache": "dual"}, {}, "cache: must be none or block .* got dual"),
        ({"delay_steps": 1}, {}, "delay_steps: applies to cache"),
        ({"cfg_scale": 1.0}, {}, "cfg_scale: must be 0"),
        ({"alg": "origin"}, {}, "alg: is for Dream"),
        ({"block_length": 257}, {}, "block_length: must be at most 256"),
        ({}, {"suffix_ids": [3]}, "suffix: must be empty"),
        ({"gen_length": 500}, {"ids": [1] * 13}, "gen_length: prompt .* must be at most 512"),
        ({"cache": "none"}, {"ids": [1] * 300}, "cache: none computes all 308 tokens"),
    ],
    ids=str,
)
def test_what_block_wise_models_cannot_do_is_refused(
    sdar: Path, fields: dict[str, Any], prompt: dict[str, Any], message: str
) -> None:
    """The error names the field and the limit."""
    engine = engine_of(sdar, max_num_batched_tokens=256)
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        engine.make_request(
            Prompt(**({"ids": [1]} | prompt)), Params(**({"gen_length": 8} | fields))
        )


def test_the_servers_cache_must_be_of_the_models_kind(sdar: Path, tmp_path: Path) -> None:
    """`DLLM_CACHE` names a policy of the checkpoint's kind; a request may not ask for another."""
    with pytest.raises(InvalidConfig, match="^DLLM_CACHE: must be one of none, block .* got dual"):
        engine_of(sdar, cache="dual")
    llada = write_llada(tmp_path)
    with pytest.raises(InvalidConfig, match="^DLLM_CACHE: must be one of none, prefix"):
        engine_of(llada, cache="block")
    with pytest.raises(InvalidRequest, match=r"^cache: .*block"):
        LLM(llada).generate([[1]], Params(cache="block"), progress=False)


def test_a_block_length_that_was_not_trained_is_warned_of(
    sdar: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each length, by the log."""
    engine = engine_of(sdar)
    for _ in range(2):
        engine.make_request(Prompt([1]), Params(gen_length=8, block_length=8))
        engine.make_request(Prompt([1]), Params(gen_length=8, block_length=4))
    warnings = [r.getMessage() for r in caplog.records if "block_length" in r.getMessage()]
    assert warnings == ["block_length 8: the checkpoint was trained for 4"]


def test_a_request_is_bitwise_the_same_alone_and_in_any_batch(sdar: Path) -> None:
    """In float32: tokens, confidences and log-probabilities, also of prompts in chunks."""
    settings: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 160}
    llm = LLM(sdar, prefix_cache=False, **settings)
    prompts = [[7 * i + k for k in range(3 + 29 * i)] for i in range(6)]
    params = [
        Params(gen_length=9 + i, ignore_eos=True, temperature=0.5 * (i % 2), seed=i, logprobs=i)
        for i in range(6)
    ]
    together = llm.generate(prompts, params, progress=False)
    for i in (0, 3, 5):
        alone = llm.generate([prompts[i]], params[i], progress=False)[0]
        assert alone.token_ids.tolist() == together[i].token_ids.tolist()
        assert alone.confidence.tobytes() == together[i].confidence.tobytes()
        ours, theirs = alone.log_probs, together[i].log_probs
        assert ours is not None
        assert theirs is not None
        assert [v.tobytes() for v in vars(ours).values()] == [
            v.tobytes() for v in vars(theirs).values()
        ]
