"""The listening socket and the process' limit of open files. Must not import the web stack: both come before it."""

from __future__ import annotations

import logging
import resource
import socket

from xllm_compiler.errors import XllmError

log = logging.getLogger("xllm.server")

_RESERVED_FILES = 64  # descriptors kept for the process itself
_DOORS = 16
_ENOUGH_FILES = 1 << 20
_MOST_CONNECTIONS = 1 << 14  # each costs some 20 KB


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises XllmError("io").

    Bound before anything slow, so that a taken port is known at once and not after a compilation.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise XllmError("io", f"cannot resolve {host[:100]!r}: {error}", where="--host") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise XllmError(
            "io", f"cannot listen on {host}:{port}: {error.strerror}", where="--port", help="choose another --port"
        ) from None
    return sock


def doors(sock: socket.socket) -> list[socket.socket]:
    """The listening socket, several times.

    libuv takes one connection from a socket each time it looks at all of them. With many connections those looks take
    long, and whoever comes last would wait for all others.
    """
    return [sock, *(sock.dup() for _ in range(_DOORS - 1))]


def raise_open_file_limit() -> int:
    """Raise the soft limit of open files to the hard one; returns the number of connections to allow below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (ValueError, OSError):  # some kernels cap nr_open below the hard limit
            log.warning("cannot raise the limit of open files above %d", soft)
    return min(_MOST_CONNECTIONS, max(16, soft - _RESERVED_FILES))
