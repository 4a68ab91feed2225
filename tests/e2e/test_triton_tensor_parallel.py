"""One model over several processes, and several instances of it, in a real tritonserver."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import LONG, GrpcStream, generate, post
from tests.support.repositories import changed_repository
from tests.support.servers import (
    REPOSITORY,
    eventually,
    has_ended,
    metric,
    stub_of,
    triton_server,
)

if TYPE_CHECKING:
    from dllm_engine import LLM

DEMO = REPOSITORY / "dllm/1/demo_checkpoint"
QUESTIONS = ["What is AI?", "What is 17 + 25?", "Sort these numbers: 5 3 9.", "Name a colour."]


@pytest.fixture
def split(tmp_path: Path) -> Iterator[TritonServer]:
    """The demo checkpoint over two ranks."""
    settings = {"DLLM_TENSOR_PARALLEL_SIZE": "2"}
    with triton_server(DEMO, settings=settings, log_file=tmp_path / "triton.log") as server:
        yield server


def rank_of(server: TritonServer) -> psutil.Process:
    """The process of the only rank besides the engine's own."""
    entry = "dllm_engine.execution.rank_worker"
    children = stub_of(server, "dllm").children()
    (rank,) = [child for child in children if any(entry in part for part in child.cmdline())]
    return rank


def asked_of(server: TritonServer) -> list[str]:
    """Answers to the questions with different caches, all asked at once."""

    def ask(number: int) -> str:
        cache = ("none", "dual", "sparse", "delayed")[number]
        fields = {"cache": cache, "cfg_scale": 0.5 * (number % 2)}
        messages = json.dumps([{"role": "user", "content": QUESTIONS[number]}])
        return generate(server, messages=messages, **fields).text

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, range(4)))


def test_two_ranks_answer_as_one_and_die_together(split: TritonServer) -> None:
    """Answers do not change when two ranks share the model; killing a rank ends the server."""
    from dllm_engine import LLM, SamplingParams

    params = [
        SamplingParams(cache=cache, cfg_scale=0.5 * (i % 2))
        for i, cache in enumerate(("none", "dual", "sparse", "delayed"))
    ]
    whole = LLM(DEMO, device="cpu").generate(QUESTIONS, params, chat=True, progress=False)
    assert all(answer.text for answer in whole)
    assert asked_of(split) == [answer.text for answer in whole]

    # After kill -9 of a rank the running request fails with a reason that names it, and the
    # server ends with all its processes.
    rank, engine = rank_of(split), stub_of(split, "dllm")
    long = {"text_input": "a", "gen_length": 500, "ignore_eos": True, "stream": True}
    with GrpcStream(split, long) as stream:
        answers = iter(stream)
        assert not next(answers).finish_reason
        rank.kill()
        with pytest.raises(InferenceServerException) as caught:
            list(answers)
    assert f"rank 1 of 2 (process {rank.pid}) was killed by signal 9" in str(caught.value)
    eventually(lambda: not split.running, "the server has ended")
    eventually(lambda: has_ended(engine), "the engine has ended")


@pytest.mark.slow
def test_ranks_end_with_their_engine(split: TritonServer) -> None:
    """After kill -9 of the engine's process no rank stays behind."""
    rank = rank_of(split)
    stub_of(split, "dllm").kill()
    eventually(lambda: has_ended(rank), "the rank has ended")
    eventually(lambda: not split.running, "the server has ended")


def test_two_instances_answer_as_one(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    """With an instance group of two, both take their share and each answer is what one gives."""
    from dllm_engine import SamplingParams

    repository = changed_repository(tmp_path, instances=2)
    prompts = [f"prompt {n}" for n in range(24)]
    params = SamplingParams(gen_length=32, ignore_eos=True)
    expected = [answer.token_ids.tolist() for answer in llm.generate(prompts, params)]
    settings = {"OMP_NUM_THREADS": "1", "DLLM_MAX_NUM_SEQS": "6"}
    with (
        triton_server(checkpoint, repository=repository, settings=settings) as server,
        ThreadPoolExecutor(24) as pool,
    ):

        def ask(prompt: str) -> list[int]:
            return generate(server, text_input=prompt, gen_length=32, ignore_eos=True).token_ids

        assert list(pool.map(ask, prompts)) == expected
        eventually(
            lambda: sum(of_each(server, "dllm_requests_finished_total")) == 24, "all are counted"
        )
        assert min(of_each(server, "dllm_requests_finished_total")) > 0
        check_cancel(server, "dllm")
        check_cancel(server, "dllm_unary")


def check_cancel(server: TritonServer, model: str) -> None:
    """Requests of either instance end by their ids, whichever is asked to end them."""
    fields = LONG | {"cfg_scale": 1.0} | ({"stream": True} if model == "dllm" else {})
    eventually(lambda: not any(of_each(server, "dllm_running_requests")), "none is left")
    with ExitStack() as stack:
        calls = [
            iter(
                stack.enter_context(
                    GrpcStream(server, fields, model=model, request_id=f"{model}-{n}")
                )
            )
            for n in range(6)
        ]
        if model == "dllm":
            assert not any(next(events).finish_reason for events in calls)
        else:  # the engines say only once a second how many they run
            eventually(lambda: sum(of_each(server, "dllm_running_requests")) == 6, "all run")
        for n in range(6):
            assert post(server, {"cancel": f"{model}-{n}"}).json()["finish_reason"] == "cancelled"
        assert [list(events)[-1].finish_reason for events in calls] == ["cancelled"] * 6


def of_each(server: TritonServer, name: str) -> list[float]:
    """A metric of either instance."""
    return [metric(server, name, instance=f"dllm_0_{n}") for n in range(2)]
