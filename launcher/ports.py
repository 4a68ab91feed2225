"""Ports: is one free, and which one is."""

import contextlib
import socket

from launcher.errors import PortTakenError

#: The system may name a port twice before a server listens on it.
_given: set[int] = set()


def require_free_port(what: str, address: str, port: int, setting: str) -> None:
    """Raises PortTakenError, which names the `setting` that moves `what`, when it is in use."""
    try:
        with contextlib.closing(_bound(address, port)):
            pass
    except OSError as error:
        raise PortTakenError(what, address, port, setting) from error


def free_port(address: str = "127.0.0.1") -> int:
    """A port that is free now, another one each time.

    Another process may take it before it is used.
    """
    while True:
        with contextlib.closing(_bound(address, 0)) as sock:
            port: int = sock.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port


def _bound(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    # Connections of a server that has just ended wait for minutes; they do not hold the port.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock
