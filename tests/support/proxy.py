"""A TCP proxy that can swallow packets, as a firewall or a lost host does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress


class SwallowingProxy:
    """Forwards connections to a local port; while it swallows, no byte gets through.

    A connection that has lost bytes never works again, and neither end is told.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._swallowing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @contextmanager
    def swallowing(self) -> Iterator[None]:
        """Let no byte through, and answer no new connection."""
        self._swallowing = True
        try:
            yield
        finally:
            self._swallowing = False

    async def serve(self) -> asyncio.Server:
        """Listen on a free port."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def close(self) -> None:
        """Drop all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        other: asyncio.StreamWriter | None = None
        try:
            answers, other = await asyncio.open_connection("127.0.0.1", self._target)
            lost = asyncio.Event()
            with suppress(ConnectionError):
                await asyncio.gather(
                    self._copy(reader, other, lost), self._copy(answers, writer, lost)
                )
        except asyncio.CancelledError:
            pass  # asyncio's server logs a cancelled handler as an error
        finally:
            for end in (writer, other):
                if end is not None:
                    end.transport.abort()

    async def _copy(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, lost: asyncio.Event
    ) -> None:
        while data := await source.read(65536):
            if self._swallowing:
                lost.set()
            if not lost.is_set():
                target.write(data)
                await target.drain()
        if not lost.is_set():
            target.close()


@asynccontextmanager
async def swallowing_proxy(target: int) -> AsyncIterator[SwallowingProxy]:
    """A proxy in front of a local port, for as long as the context lasts."""
    proxy = SwallowingProxy(target)
    server = await proxy.serve()
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
