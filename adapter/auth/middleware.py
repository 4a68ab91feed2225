"""Checks the key and the rate before any route.

It is a middleware and not a dependency, so that it covers every route, and no body of a client
without a key is read.
"""

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from adapter.auth.keys import Keyring
from adapter.auth.rate_limit import Quota, RateLimiter
from adapter.errors import AdapterError, Unauthorized

API = "/v1/"
#: Open to load balancers and orchestrators, which have no key.
OPEN = frozenset({"/v1/health", "/v1/livez"})
METRICS = "/metrics"


class AuthMiddleware:
    """Answers 401 and 429, in the format of the route's other errors."""

    def __init__(self, app: ASGIApp, *, keyring: Keyring, guard_metrics: bool) -> None:
        self._app = app
        self._keyring = keyring
        self._guard_metrics = guard_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            await self._admit(request, _path_in_app(scope))
        except AdapterError as error:
            handler = request.app.exception_handlers[AdapterError]
            response = await handler(request, error)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _admit(self, request: Request, path: str) -> None:
        guarded = path.startswith(API) and path not in OPEN
        # All that begins so, as a route also matches its path with a line end behind it.
        if not guarded and not (self._guard_metrics and path.startswith(METRICS)):
            return
        name = None
        if self._keyring.required:
            name = self._keyring.name_of(_key(request))
            if name is None:
                msg = "an API key is required: send X-API-Key: KEY, or Authorization: Bearer KEY"
                raise Unauthorized(msg)
        request.state.api_key = name
        request.state.caller = f"key:{name}" if name else f"address:{_address(request)}"
        # Polling and cancelling cost the engine nothing, so they are not counted.
        if guarded and request.method == "POST":
            limiter: RateLimiter | None = request.app.state.rate_limiter
            if limiter is not None:
                request.state.quota = Quota(limiter, request.state.caller)
                await request.state.quota.take()


def _key(request: Request) -> str:
    if key := request.headers.get("x-api-key"):
        return key
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _address(request: Request) -> str:
    """The client's address; behind a proxy, see uvicorn's `--forwarded-allow-ips`."""
    return request.client.host if request.client else "unknown"


def _path_in_app(scope: Scope) -> str:
    """The path that routes match, without the prefix of a proxy."""
    path: str = scope["path"]
    prefix = scope.get("root_path", "").rstrip("/")
    if prefix and path.startswith(f"{prefix}/"):
        return path[len(prefix) :]
    return path
