"""Reads the body of a call, within limits of size, time, form and number of values.

Only a call whose route takes a body has it read. The limits keep a body from costing more memory or
time than its size allows: 4 MiB of JSON may hold 1,400,000 lists, each of which costs Python 64
bytes and a validator a microsecond.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from email.message import Message as Headers

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter.errors import (
    AdapterError,
    BodyTimeout,
    BodyTooLarge,
    BodyTooManyValues,
    NotJson,
    TooManyBodies,
)
from adapter.shares import share_of

#: Most values in a body: 64 prompts of 4096 token ids, and some more.
MAX_VALUES = 300_000
#: A worker reads so many of the largest bodies at the same time, or more smaller ones.
BODIES_AT_ONCE = 16
#: Bodies larger than this are parsed one after the other, with a pause for other calls.
LARGE_BYTES = 256 * 1024
#: Length of the pause, in seconds per byte; parsing takes about a tenth of it.
TURN = 0.25 / 2**20
#: A value follows each of these. They are counted inside strings too, since finding strings costs
#: more than parsing; no prompt that fits a model has so many.
SEPARATORS = (b",", b"[", b"{")


class BodyMiddleware:
    """Reads bodies; answers 408, 413, 415 and 503, in the format of the route's other errors."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Sequence[BaseRoute],
        max_bytes: int,
        timeout: float,
        key_share: float,
    ) -> None:
        self._app = app
        self._routes = [
            route for route in routes if isinstance(route, APIRoute) and route.body_field
        ]
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._most_held = BODIES_AT_ONCE * max_bytes
        # At least one of the largest bodies.
        self._most_of_caller = max(max_bytes, share_of(self._most_held, key_share))
        #: Bytes of the bodies that are being read now, by their caller: a key, or else an address.
        self._held: Counter[str] = Counter()
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on with its body, or answer it with an error."""
        if scope["type"] != "http" or not self._takes_body(scope):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            body = await self._read(request)
            if body:
                _check_form(request)
                _check_values(body)
        except ClientDisconnect:
            return
        except AdapterError as error:
            handler = request.app.exception_handlers[AdapterError]
            response = await handler(request, error)
            await response(scope, receive, send)
            return
        await self._app(scope, _Replay(body, receive), send)

    def _takes_body(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is Match.FULL for route in self._routes)

    async def _read(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        caller: str = getattr(request.state, "caller", "")
        try:
            async with asyncio.timeout(self._timeout):
                async for chunk in request.stream():
                    body += chunk
                    self._held[caller] += len(chunk)
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    self._require_room(caller)
            if len(body) > LARGE_BYTES:
                async with self._turn:
                    if await request.is_disconnected():
                        raise ClientDisconnect  # others need not wait for it
                    await asyncio.sleep(TURN * len(body))
        except TimeoutError:
            msg = f"the body was not complete within {self._timeout:g} s (DLLM_BODY_TIMEOUT)"
            raise BodyTimeout(msg) from None
        finally:
            self._held[caller] -= len(body)
            if not self._held[caller]:
                del self._held[caller]
        return bytes(body)

    def _require_room(self, caller: str) -> None:
        if self._held.total() > self._most_held:
            msg = "too many bodies are being sent at the same time"
            raise TooManyBodies(msg)
        if self._held[caller] > self._most_of_caller:
            source = "with this key" if caller.startswith("key:") else "from this address"
            msg = f"too many bodies are being sent {source} at the same time (DLLM_KEY_SHARE)"
            raise TooManyBodies(msg)

    def _too_large(self) -> BodyTooLarge:
        msg = f"the body is larger than {self._max_bytes} bytes (DLLM_MAX_BODY_BYTES)"
        return BodyTooLarge(msg)


def _check_form(request: Request) -> None:
    """Raise `NotJson` unless the header says JSON.

    A body of another type is not taken for JSON: any web page may have a browser send one.
    """
    given = request.headers.get("content-type", "")
    headers = Headers()
    headers["content-type"] = given
    kind, subtype = headers.get_content_maintype(), headers.get_content_subtype()
    if given and kind == "application" and (subtype == "json" or subtype.endswith("+json")):
        return
    got = f"it is {given[:100]!r}" if given else "there is none"
    msg = f"the header Content-Type must be application/json; {got}"
    raise NotJson(msg)


def _check_values(body: bytes) -> None:
    """Raise `BodyTooManyValues`, or `NotJson` for an encoding in which they cannot be counted."""
    if b"\0" in body[:4]:
        msg = "the body must be encoded as UTF-8"
        raise NotJson(msg)
    if sum(body.count(separator) for separator in SEPARATORS) > MAX_VALUES:
        msg = f"the body holds more than {MAX_VALUES} values"
        raise BodyTooManyValues(msg)


class _Replay:
    """An ASGI `receive` that returns the body already read, then passes messages on."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
