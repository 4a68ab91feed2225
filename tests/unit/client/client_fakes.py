"""A scripted server behind httpx's transport seam."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

Answer = httpx.Response | BaseException | Callable[[httpx.Request], httpx.Response]


def job(status: str, text: str | None = None, request_id: int = 0, **more: Any) -> httpx.Response:
    fields = {"request_id": request_id, "status": status, "text": text, **more}
    return httpx.Response(200, json=fields)


def submitted(*request_ids: int) -> httpx.Response:
    return httpx.Response(200, json={"request_ids": list(request_ids), "status": "submitted"})


@dataclass
class Script:
    """Gives its answers in order, the last one again and again; remembers what it was asked."""

    answers: list[Answer] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        if not isinstance(answer, httpx.Response):
            return answer(request)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def asked(self) -> list[str]:
        return [f"{request.method} {request.url.path}" for request in self.requests]


@dataclass
class BatchServer:
    """Takes batches up to a limit and answers each prompt; refuses what its rules say."""

    limit: int
    #: Refuses, with the place, a prompt that is this text.
    bad: str | None = None
    #: Characters that one call may have.
    max_chars: int = 10_000
    #: Jobs that may be queued at once.
    room: int = 10_000
    calls: list[int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    _prompts: list[str] = field(default_factory=list)
    _fetched: int = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        number = int(request.url.path.rpartition("/")[2]) if request.method != "POST" else 0
        if request.method == "GET":
            self._fetched += 1
            return job("finished", f"answer-{self._prompts[number]}", number)
        if request.method == "DELETE":
            self.cancelled.append(number)
            return job("cancelled", request_id=number)
        body = json.loads(request.content)
        self.bodies.append(body)
        return self._submit(body.get("prompts") or [body["prompt"]])

    def _submit(self, prompts: list[str]) -> httpx.Response:
        if len(prompts) > self.limit:
            return _refusal(["body", "prompts"], "is too long", ctx={"max_length": self.limit})
        if sum(map(len, prompts)) > self.max_chars:
            return httpx.Response(413, json={"detail": "the body is too large"})
        if self.bad in prompts:
            return _refusal(["body", "prompts", prompts.index(self.bad)], "is bad")
        if len(self._prompts) - self._fetched + len(prompts) > self.room:
            return httpx.Response(429, json={"detail": "the queue is full"})
        first = len(self._prompts)
        self.calls.append(len(prompts))
        self._prompts += prompts
        return submitted(*range(first, first + len(prompts)))


def _refusal(place: list[str | int], message: str, **more: Any) -> httpx.Response:
    problem = {"type": "x", "loc": place, "msg": message, **more}
    return httpx.Response(422, json={"detail": [problem]})
