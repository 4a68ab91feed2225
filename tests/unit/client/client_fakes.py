"""A scripted server behind httpx's transport seam."""

from dataclasses import dataclass, field
from typing import Any

import httpx

Answer = httpx.Response | BaseException


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
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def asked(self) -> list[str]:
        return [f"{request.method} {request.url.path}" for request in self.requests]
