"""Finds free ports, and refuses taken ones."""

import contextlib
import errno
import socket

from launcher.errors import PortTakenError, SettingError

#: The system may name a port twice before a server listens on it.
_given: set[int] = set()


def require_free_port(what: str, address: str, port: int, setting: str) -> None:
    """Raises PortTakenError, which names the `setting` that moves `what`, when it is in use.

    Raises SettingError when this machine has no such address, or this user may not have the port.
    """
    try:
        with contextlib.closing(_bound(address, port)):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(what, address, port, setting) from error
        reason = error.strerror or str(error)
        raise SettingError(f"{what} port {port} on {address} cannot be used: {reason}") from error


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
