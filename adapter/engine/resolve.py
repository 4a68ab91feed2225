"""Finds the tritonservers behind the addresses of `DLLM_TRITON_URL`."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address

from adapter.telemetry.logs import get_logger

log = get_logger()

LOOKUP_SECONDS = 2.0

#: Looks a host up: the IP addresses, or an OSError.
Lookup = Callable[[str], Awaitable[list[str]]]


async def look_up(host: str) -> list[str]:
    """The host's IPv4 addresses, or its IPv6 ones if it has no others. Raises OSError.

    A server with both kinds counts once.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    kinds = {family for family, *_ in found}
    family = socket.AF_INET if socket.AF_INET in kinds else socket.AF_INET6
    return sorted({str(address[0]) for kind, _, _, _, address in found if kind == family})


class Resolver:
    """Turns host:port into one host:port for each server.

    While a name has one address, it stands for itself. A lookup that fails changes nothing.
    """

    def __init__(self, lookup: Lookup = look_up) -> None:
        self._lookup = lookup
        self._known: dict[str, list[str]] = {}
        self._failing: set[str] = set()

    async def resolve(self, urls: Sequence[str]) -> dict[str, str]:
        """The servers' addresses, each with the one of `urls` that it comes from."""
        found = await asyncio.gather(*(self._servers_of(url) for url in urls))
        servers: dict[str, str] = {}
        for url, addresses in zip(urls, found, strict=True):
            for address in addresses:
                servers.setdefault(address, url)
        return servers

    async def _servers_of(self, url: str) -> list[str]:
        host, _, port = url.rpartition(":")
        if host == "localhost" or _is_ip(host.strip("[]")):
            return [url]
        known = self._known.get(url, [url])
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                hosts = await self._lookup(host)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            if url not in self._failing:
                log.warning("lookup_failed", host=host, error=str(error) or "no answer")
            self._failing.add(url)
            return known
        self._failing.discard(url)
        # After it had several addresses it never stands for itself again: gRPC would choose one.
        if len(hosts) > 1 or known != [url]:
            self._known[url] = known = [
                f"[{one}]:{port}" if ":" in one else f"{one}:{port}" for one in hosts
            ]
        return known


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
