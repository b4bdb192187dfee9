"""The child's side: takes calls from a socket on fd 0, does each within its limits, answers. Run by its file in an
isolated interpreter; owns the limits and the framing, must not import anything of this project.

A message is four bytes of length, big-endian, and that much JSON. A call is {"call": name, "with": arguments, "cpu":
seconds, "wall": seconds}; an answer {"value": ..} or {"error": text, "kind": class}, or {"over": "memory"} before the
process ends itself. A call that takes too long is ended by the timer's signal, with no help from the interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

_ERROR_CHARACTERS = 2000


def receive(channel: socket.socket) -> bytes | None:
    """One message; None when the other side is gone."""
    head = _exactly(channel, 4)
    return None if head is None else _exactly(channel, int.from_bytes(head, "big"))


def _exactly(channel: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = channel.recv(min(count - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def _handlers(path: str) -> Mapping[str, Callable[[Any], Any]]:
    """What the file at `path` lists as CALLS."""
    spec = importlib.util.spec_from_file_location("handlers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls: Mapping[str, Callable[[Any], Any]] = module.CALLS
    return calls


def _confine(memory: int) -> None:
    """Less memory, no new files, no new processes, behind those who serve streams."""
    for which, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(which)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (least, least))


def _alarm(cpu: float, wall: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, wall)


def _answer(handlers: Mapping[str, Callable[[Any], Any]], message: bytes) -> dict[str, Any]:
    call = json.loads(message)
    _alarm(call["cpu"], call["wall"])
    try:
        return {"value": handlers[call["call"]](call["with"])}
    except MemoryError:
        return {"over": "memory"}
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        kind = type(error).__name__
        return {"error": (str(error) or kind)[:_ERROR_CHARACTERS], "kind": kind}


def main() -> None:
    """Serve until the other side closes the socket."""
    options = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the server, which drains
    for ends in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(ends, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    sys.path[:] = [*sys.path, *options["paths"]]
    os.nice(options["nice"])
    channel = socket.socket(fileno=0)
    handlers = _handlers(options["handlers"])
    _confine(options["memory"])
    while (message := receive(channel)) is not None:
        try:
            answer = _answer(handlers, message)
            del message
            data = json.dumps(answer).encode()
            if len(data) > options["answer"]:
                data = b'{"over": "answer"}'
        except MemoryError:
            answer, data = {"over": "memory"}, b'{"over": "memory"}'
        _alarm(0, 0)
        channel.sendall(len(data).to_bytes(4, "big") + data)
        if "over" in answer:
            return  # who knows what is left in a process that ran out of memory


if __name__ == "__main__":
    main()
