"""The parent's side: starts the child, sends it calls one at a time, starts a new one when a call was too much for it.
Owns the child's life; must not know what it computes.

The child gets no secrets (an almost empty environment), no file or socket of ours but the one to talk over, and nothing
of the current directory or of PYTHONPATH on its import path. It ends when our end of the socket is closed, so it does
not outlive us by more than the call that it is in.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xllm_compiler.errors import XllmError

_HERE = Path(__file__).resolve().parent
_KEPT = ("TZ", "LD_LIBRARY_PATH", "LANG", "LC_ALL")  # what a process needs to start and to tell the time
_NICE = 5  # behind those who serve streams
_GRACE = 2.0  # seconds beyond a call's own limit until we end the child ourselves


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one call: seconds of processor, seconds on the wall; of the process: bytes of address space, bytes of an
    answer; of the parent: calls that may wait."""

    cpu: float = 2.0
    wall: float = 10.0
    memory: int = 512 * 2**20
    answer: int = 64 * 2**20
    waiting: int = 1024


class Refusal(Exception):
    """The call raised; `str()` is what, `kind` the name of the exception's class."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class Overrun(Exception):
    """The call was ended: `str()` says which limit it met, such as "takes longer than 2 s"."""


class Confined:
    """A child process that answers calls. `call` blocks, `acall` waits on an event loop; both may be used, though not
    at the same time. After an overrun the next call finds a new child."""

    def __init__(
        self, handlers: str, packages: Sequence[str], limits: Limits, opening: tuple[str, Any] | None = None
    ) -> None:
        """`handlers`: the module of this package that the child runs; `packages`: what it imports beside the standard
        library; `opening`: a first call that every child gets, whose value is `opened()`."""
        self._handlers = _HERE / f"{handlers}.py"
        self._packages = tuple(packages)
        self._limits = limits
        self._opening = opening
        self._child: _Child | None = None
        self._lock = threading.Lock()
        self._turn: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None
        self._waiting = 0

    @property
    def pid(self) -> int | None:
        """The child's process id; None when there is none now."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Start the child, if there is none, without waiting for it. Raises XllmError("io")."""
        if self._child is not None:
            return
        paths = sorted({str(_site(package)) for package in self._packages})
        opening = None if self._opening is None else _message(*self._opening, self._limits)
        self._child = _Child(self._handlers, paths, self._limits, opening)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def opened(self) -> Any:
        """The value of the opening call. Raises Refusal and Overrun, whatever it did in the child; XllmError("io")."""
        with self._lock:
            self.start()
            child = self._child
            assert child is not None
            return self._guard(child, child.opened)

    def call(self, name: str, arguments: Any, *, cpu: float | None = None) -> Any:
        """What the child makes of it, in at most `cpu` seconds of processor time if that is given. Raises Refusal,
        Overrun and XllmError("io")."""
        with self._lock:
            self.start()
            child = self._child
            assert child is not None
            limits = self._limits if cpu is None else replace(self._limits, cpu=cpu)
            message = _message(name, arguments, limits)
            return self._guard(child, lambda: child.call(message))

    async def aopened(self) -> Any:
        """As `opened`, beside whatever else the event loop does."""
        child = self._child
        if child is not None and child.is_open:
            return child.opened()
        return await self._take_turn(None)

    async def acall(self, name: str, arguments: Any) -> Any:
        """As `call`, beside whatever else the event loop does. Raises XllmError("capacity") when too many wait."""
        return await self._take_turn(_message(name, arguments, self._limits))

    async def _take_turn(self, message: bytes | None) -> Any:
        if self._waiting >= self._limits.waiting:
            raise XllmError("capacity", f"{self._waiting} requests wait for the chat template already")
        loop = asyncio.get_running_loop()
        if self._turn is None or self._turn[0] is not loop:
            self._turn = (loop, asyncio.Lock())
        turn = self._turn[1]
        self._waiting += 1
        try:
            await turn.acquire()
        finally:
            self._waiting -= 1
        # A caller that is cancelled must not leave half an exchange behind, so what has begun goes on without it.
        task = asyncio.ensure_future(self._exchange(message))

        def done(task: asyncio.Task[Any]) -> None:
            turn.release()
            if not task.cancelled():
                task.exception()

        task.add_done_callback(done)
        return await asyncio.shield(task)

    async def _exchange(self, message: bytes | None) -> Any:
        self.start()
        child = self._child
        assert child is not None
        try:
            async with asyncio.timeout(self._limits.wall + _GRACE):
                if not child.is_open:
                    await asyncio.to_thread(child.opened)
                return child.opened() if message is None else await child.exchange(message)
        except (OSError, EOFError, Overrun) as error:  # a TimeoutError is an OSError
            raise await asyncio.to_thread(self._ended, child, error) from None
        except asyncio.CancelledError:
            self.close()
            raise

    def _guard(self, child: _Child, exchange: Callable[[], Any]) -> Any:
        try:
            return exchange()
        except (OSError, EOFError, Overrun) as error:
            raise self._ended(child, error) from None
        except KeyboardInterrupt:
            self.close()
            raise

    def _ended(self, child: _Child, error: Exception) -> Exception:
        """The child cannot be used any more: why, and a new one is on its way."""
        code = child.end(wait=not isinstance(error, TimeoutError))
        if not isinstance(error, Overrun):
            error = _overrun(code, self._limits)
        if self._child is child:
            self._child = None
            try:
                self.start()
            except XllmError as fault:
                return fault
        return error


class _Child:
    """One process and our end of the socket to it."""

    def __init__(self, handlers: Path, paths: Sequence[str], limits: Limits, opening: bytes | None) -> None:
        self._limits = limits
        options = {
            "handlers": str(handlers),
            "paths": list(paths),
            "memory": limits.memory,
            "answer": limits.answer,
            "nice": _NICE,
        }
        command = [sys.executable, "-I", "-S", str(_HERE / "worker.py"), json.dumps(options)]
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    executable="/proc/self/exe",  # runs already: its path may be closed to this user
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise XllmError("io", f"cannot start the process for chat templates: {error.strerror}") from None
        self._socket = ours
        self._finalizer = weakref.finalize(self, _finish, self._process, ours)
        self._first: Any = None
        self._opening = threading.Lock()
        self.is_open = opening is None
        if opening is not None:
            with contextlib.suppress(OSError):  # it died at once: whoever asks it next learns of that
                self.send(opening)

    @property
    def pid(self) -> int:
        return self._process.pid

    def opened(self) -> Any:
        """The value of the opening call, whose answer comes before all others."""
        with self._opening:  # a start-up check and a first request may both wait for it
            if not self.is_open:
                self._first = self.receive()
                self.is_open = True
        return None if self._first is None else self._value(self._first)

    def send(self, message: bytes) -> None:
        self._socket.settimeout(self._limits.wall + _GRACE)
        self._socket.sendall(message)

    def receive(self) -> Any:
        deadline = time.monotonic() + self._limits.wall + _GRACE
        return json.loads(self._exactly(int.from_bytes(self._exactly(4, deadline), "big"), deadline))

    def _exactly(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            part = self._socket.recv(min(count - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def call(self, message: bytes) -> Any:
        self.opened()
        self.send(message)
        return self._value(self.receive())

    async def exchange(self, message: bytes) -> Any:
        """As `call`, once the child is open. The caller sets a time."""
        self.opened()
        loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        await loop.sock_sendall(self._socket, message)
        data = bytearray()
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
            part = await loop.sock_recv(self._socket, 1 << 20)
            if not part:
                raise EOFError
            data += part
        return self._value(json.loads(data[4:]))

    def _value(self, answer: Any) -> Any:
        if "value" in answer:
            return answer["value"]
        if "error" in answer:
            raise Refusal(answer["error"], answer["kind"])
        if answer["over"] == "memory":
            raise Overrun(f"needs more than {self._limits.memory >> 20} MiB of memory")
        raise Overrun(f"writes more than {self._limits.answer >> 20} MiB")

    def end(self, wait: bool = False) -> int:
        """End the process, after a moment in which it may end itself if `wait`; its exit status as Popen has it."""
        if wait:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        self._finalizer()
        return int(self._process.returncode)


def _finish(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    if process.poll() is None:
        process.kill()
    process.wait()


def _site(package: str) -> Path:
    """The folder from which we would import a package; looking for it does not import it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise XllmError("internal", f"{package} is not installed", help="install xllm-compiler again")
    return Path(spec.origin).resolve().parent.parent


def _message(call: str, arguments: Any, limits: Limits) -> bytes:
    try:
        data = json.dumps({"call": call, "with": arguments, "cpu": limits.cpu, "wall": limits.wall}).encode()
    except (ValueError, RecursionError) as error:
        raise XllmError("request", f"this cannot be written as JSON: {error}") from None
    return len(data).to_bytes(4, "big") + data


def _overrun(code: int, limits: Limits) -> Overrun:
    if code == -signal.SIGPROF:
        return Overrun(f"takes more than {limits.cpu:g} s of processor time")
    if code == -signal.SIGALRM or code == -signal.SIGKILL:
        return Overrun(f"takes longer than {limits.wall:g} s")
    return Overrun(f"ended its process: {signal.Signals(-code).name if code < 0 else f'status {code}'}")
