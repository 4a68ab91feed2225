"""Clients of the engine that `benchmarks.serving` compares, from a call in this process to HTTP.

Each sends a question as one chat message, greedily, and returns the text, so that only the way
differs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

import aiohttp
import numpy as np
from dllm_engine import CanvasUpdate, Engine, EngineConfig, EngineThread, Prompt, SamplingParams
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from benchmarks.common import DEMO_CHECKPOINT

#: Seconds of one held poll.
WAIT = 60
#: Triton's and NumPy's data types of the requests' values.
TENSOR_TYPES: dict[type, tuple[str, Any]] = {
    str: ("BYTES", np.object_),
    bool: ("BOOL", np.bool_),
    int: ("INT64", np.int64),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """Parameters of a question; the whole canvas is decoded."""

    gen_length: int
    steps: int
    cache: str = "dual"

    def fields(self) -> dict[str, Any]:
        """Fields of a request, with names that all ways share."""
        return dataclasses.asdict(self) | {"ignore_eos": True}


class Way(Protocol):
    """One way to the engine."""

    async def ask(self, question: str, work: Work) -> str:
        """Return the answer, without a stream."""

    async def watch(self, question: str, work: Work) -> int:
        """Read a stream to its end; returns the number of events."""


class InProcess:
    """The engine in this process, on its own thread."""

    def __init__(self) -> None:
        engine = Engine(EngineConfig(model_path=DEMO_CHECKPOINT, device="cpu"))
        assert engine.tokenizer is not None
        self._tokenizer = engine.tokenizer
        self._worker = EngineThread(engine)

    async def ask(self, question: str, work: Work) -> str:
        """One final update."""
        updates = [update async for update in self._updates(question, work, None)]
        last = updates[-1]
        return self._tokenizer.answer(last.token_ids[: last.num_ready], ())

    async def watch(self, question: str, work: Work) -> int:
        """An update per step."""
        return len([update async for update in self._updates(question, work, 0.0)])

    async def _updates(
        self, question: str, work: Work, interval: float | None
    ) -> AsyncIterator[CanvasUpdate]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[CanvasUpdate] = asyncio.Queue()
        request = self._worker.engine.make_request(
            Prompt(self._tokenizer.encode_chat(question)),
            SamplingParams(**work.fields()),
            stream_interval=interval,
        )

        def note(update: CanvasUpdate) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, update)

        self._worker.submit(request, note)
        while True:
            update = await arrived.get()
            if update.error is not None:
                raise update.error
            yield update
            if update.finished:
                return

    def close(self) -> None:
        """Stop the engine's thread."""
        self._worker.close()


class Triton:
    """tritonclient to tritonserver: a gRPC stream per request, like the adapter."""

    def __init__(self, grpc_url: str) -> None:
        self._client = InferenceServerClient(grpc_url)

    async def ask(self, question: str, work: Work) -> str:
        """One response."""
        text = ""
        async for response in self._responses(question, work, stream=False):
            text = response.as_numpy("text_output").reshape(-1)[0].decode()
        return text

    async def watch(self, question: str, work: Work) -> int:
        """A response per step."""
        return len([1 async for _ in self._responses(question, work, stream=True)])

    async def _responses(self, question: str, work: Work, *, stream: bool) -> AsyncIterator[Any]:
        messages = json.dumps([{"role": "user", "content": question}])
        fields = {"messages": messages, **work.fields(), "stream": stream}
        inputs = [self._tensor(name, value) for name, value in fields.items()]

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "dllm", "inputs": inputs}

        async for result, error in self._client.stream_infer(requests()):
            if error is not None:
                raise error
            yield result

    def _tensor(self, name: str, value: Any) -> InferInput:
        datatype, dtype = TENSOR_TYPES[type(value)]
        array = np.array([[value.encode() if isinstance(value, str) else value]], dtype=dtype)
        tensor = InferInput(name, [1, 1], datatype)
        tensor.set_data_from_numpy(array)
        return tensor

    async def close(self) -> None:
        """Close the channel."""
        await self._client.close()


class Jobs:
    """Jobs through the adapter: submit, then a poll that is held until the job is done."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def ask(self, question: str, work: Work) -> str:
        """Two calls."""
        submitted = await _post(self._session, "/v1/generate", {"prompt": question}, work)
        url = f"/v1/result/{submitted['request_ids'][0]}"
        while True:
            async with self._session.get(url, params={"wait": WAIT}) as response:
                job = await response.json()
            if job["status"] == "finished":
                return str(job["text"])
            assert job["status"] == "running", job

    async def watch(self, question: str, work: Work) -> int:
        """Server-sent events, one per step, and one with the answer."""
        return await _count_events(
            self._session, "/v1/generate/stream", {"prompt": question, **work.fields()}
        )


class Chat:
    """OpenAI's chat completions through the adapter."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def ask(self, question: str, work: Work) -> str:
        """One call."""
        async with self._session.post("/v1/chat/completions", json=self._body(question, work)) as r:
            body = await r.json()
        assert r.status == 200, body
        return str(body["choices"][0]["message"]["content"])

    async def watch(self, question: str, work: Work) -> int:
        """One chunk whenever the final text grows."""
        body = self._body(question, work) | {"stream": True}
        return await _count_events(self._session, "/v1/chat/completions", body)

    def _body(self, question: str, work: Work) -> dict[str, Any]:
        fields = work.fields()
        return {
            "model": "dllm",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": fields.pop("gen_length"),
            **fields,
        }


async def _post(
    session: aiohttp.ClientSession, path: str, body: dict[str, Any], work: Work
) -> dict[str, Any]:
    async with session.post(path, json=body | work.fields()) as response:
        answer: dict[str, Any] = await response.json()
    assert response.status == 200, answer
    return answer


async def _count_events(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> int:
    count = 0
    async with session.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            count += line.startswith(b"data:")
    return count
