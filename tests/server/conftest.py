"""A server around the real engine and a made-up executor, whose logits are known by construction."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from xllm_compiler.runtime.chat_template import ChatTemplate
from xllm_compiler.runtime.engine import Engine
from xllm_compiler.runtime.executor import Outputs
from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.server import lifecycle
from xllm_compiler.runtime.server.access import Cors, Hosts
from xllm_compiler.runtime.server.app import build_app
from xllm_compiler.runtime.server.budget import Budget
from xllm_compiler.runtime.server.connection_guard import ConnectionGuard
from xllm_compiler.runtime.server.context import Context
from xllm_compiler.runtime.server.engine_client import EngineClient
from xllm_compiler.runtime.server.metrics import Metrics
from xllm_compiler.runtime.server.sockets import bind, doors
from xllm_compiler.runtime.tokenizer import Tokenizer
from xllm_compiler.step.inputs import StepBatch, step_inputs
from xllm_compiler.step.interface import EMBED, HIDDEN, LOGITS, STEP, Function, Pooling

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANY_HOST = Hosts(("*",))
EOS = 256
VOCAB = 260


def byte_tokenizer() -> Tokenizer:
    """One token per byte: the id is the byte. 256 is the end of a text, 257 to 259 have no name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {byte_name(byte): byte for byte in range(256)}
    assert sorted(table) == alphabet
    core = tokenizers.Tokenizer(models.BPE(vocab=table, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken("<eos>", special=True)])
    return Tokenizer(core, {"eos_token": "<eos>"}, ChatTemplate(TEMPLATE))


def byte_name(byte: int) -> str:
    """GPT-2's printable name of a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


class NextByte:
    """Logits that make each token's successor the next byte: "a" is followed by "b"; "z" by the end of the text."""

    def __init__(self, pages: int = 64) -> None:
        self.pages = pages
        self.delay = 0.0
        self.open = threading.Event()
        self.open.set()
        self.fail = False
        self.steps = 0

    def new_batch(self, function: str = STEP) -> StepBatch:
        return StepBatch(function, Function(step_inputs(512, 16), (), (), ()), {"N": 64, "B": 8, "S": 64})

    def execute(self, batch: StepBatch) -> Outputs:
        self.open.wait(20)
        if self.fail:
            raise RuntimeError("made to fail")
        if self.delay:
            time.sleep(self.delay)
        self.steps += 1
        rows = np.zeros((batch.sizes["S"], VOCAB), np.float32)
        for row, at in enumerate(batch["sel"][: batch.sizes["S"]]):
            token = int(batch["ids"][at])
            rows[row, EOS if token == ord("z") else (token + 1) % 256] = 5.0
            rows[row, (token + 2) % 256] = 3.0
        return {HIDDEN if batch.function == EMBED else LOGITS: rows}

    def close(self) -> None:
        self.open.set()


@dataclass
class Served:
    """One server's parts."""

    ctx: Context
    engine: Engine
    executor: NextByte
    guard: ConnectionGuard
    app: Any
    server: lifecycle.Server | None = None
    url: str = ""

    def client(self, **options: Any) -> httpx.AsyncClient:
        """In-process: no sockets."""
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test", **options)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One in-process request from a test that is not async."""

        async def go() -> httpx.Response:
            self.ctx.engine_client.attach(asyncio.get_running_loop())
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(go())

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.ask("POST", path, json=fields)


Maker = Callable[..., Served]


@pytest.fixture
def make() -> Iterator[Maker]:
    """Makes servers that are not listening, from the options below and fields of Context."""
    made: list[Served] = []

    def build(
        *,
        pages: int = 64,
        max_model_len: int = 512,
        keys: tuple[str, ...] = (),
        max_waiting: int = 16,
        receive_timeout: float = 5.0,
        max_connections: int = 10_000,
        budget_bytes: int = 128 * 2**20,
        hosts: Hosts = ANY_HOST,
        cors: Cors | None = None,
        embeds: bool = False,
        **fields: Any,
    ) -> Served:
        model_info = ModelInfo("made-up", "Fake", "a" * 64, "f32", VOCAB, max_model_len, (EOS,), None, 8, 64, 64, 16)
        if embeds:
            pooling = Pooling("mean", True, None)
            model_info = replace(model_info, functions=(STEP, EMBED), pooling=pooling, embedding_size=VOCAB)
        executor = NextByte(pages)
        tokenizer = byte_tokenizer()
        engine = Engine(executor, model_info, tokenizer=tokenizer)
        engine.start()
        metrics = Metrics("made-up")
        ctx = Context(
            tokenizer=tokenizer,
            model_info=model_info,
            engine_client=EngineClient(engine, metrics, 8 + max_waiting),
            metrics=metrics,
            names=("made-up", "alias"),
            defaults={"temperature": 0.0},
            health=lifecycle.health_check(engine, 0.5),
            version="0",
            pool_tokens=pages * 16,
            receive_timeout=receive_timeout,
            budget=Budget(budget_bytes),
            **fields,
        )
        guard = ConnectionGuard(max_connections, receive_timeout, ctx.budget)
        made.append(Served(ctx, engine, executor, guard, build_app(ctx, keys, hosts=hosts, cors=cors)))
        return made[-1]

    yield build
    for served in made:
        served.executor.open.set()
        served.engine.stop()


@pytest.fixture
def fake(make: Maker) -> Served:
    return make()


@contextlib.contextmanager
def listening(served: Served, drain: float = 5.0, keep_alive: int = 5) -> Iterator[Served]:
    """The server on a free port of this machine, in a thread."""
    config = lifecycle.make_config(served.app, served.guard, keep_alive=keep_alive, certfile=None, keyfile=None)
    sock = bind("127.0.0.1", 0)
    ready = threading.Event()
    served.server = lifecycle.Server(config, served.ctx, drain, ready.set)
    served.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    loop_factory = config.get_loop_factory()
    assert loop_factory is not None

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            served.ctx.engine_client.attach(runner.get_loop())
            assert served.server is not None
            runner.run(served.server.serve(doors(sock)))

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        yield served
    finally:
        served.server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def live(fake: Served) -> Iterator[Served]:
    with listening(fake):
        yield fake


@pytest.fixture
def listen() -> Callable[..., Any]:
    return listening


def wait_until(check: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether `check` came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.005)
    return check()


@pytest.fixture
def until() -> Callable[..., bool]:
    return wait_until


BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"
BIN = Path(sys.executable).parent
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "tvm", "tvm_ffi"):
            raise ImportError(f"the server must not import {name}")

sys.meta_path.insert(0, Blocker())
"""


@dataclass
class Process:
    """A running `xllm-serve`."""

    popen: subprocess.Popen[str]
    log: Path
    began: float
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def wait_ready(self, seconds: float = 60) -> Process:
        """Until it says where it serves."""
        timer = threading.Timer(seconds, self.popen.kill)
        timer.start()
        assert self.popen.stdout is not None
        try:
            for line in self.popen.stdout:
                self.lines.append(line.rstrip())
                found = re.search(r"serving .* on (https?://\S+)", line)
                if found:
                    self.url = found[1]
                    return self
        finally:
            timer.cancel()
        raise AssertionError(f"the server ended with {self.popen.wait()}:\n{self.log.read_text()}")

    def end(self, sig: int = signal.SIGTERM, seconds: float = 30) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(sig)
        try:
            return self.popen.wait(seconds)
        finally:
            self.popen.kill()


@pytest.fixture(scope="session")
def real_artifact(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint, compiled by the command that users run; a later session finds it in the compile cache."""
    kept = pytestconfig.cache
    cache = kept.mkdir("xllm-compile") if kept is not None else tmp_path_factory.mktemp("cache")
    command = [BIN / "xllm-compile", BUNDLED, "--cache-dir", cache]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


Starter = Callable[..., Process]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts `xllm-serve` processes in which importing torch, transformers or TVM fails."""
    blocker = tmp_path_factory.mktemp("blocker")
    (blocker / "sitecustomize.py").write_text(BLOCKER)
    running: list[Process] = []

    def start(model: Path, *flags: str, blocked: bool = True, **environ: str) -> Process:
        log = tmp_path_factory.mktemp("log") / "stderr"
        env = {**os.environ, **environ, **({"PYTHONPATH": str(blocker)} if blocked else {})}
        with log.open("w") as stderr:
            began = time.monotonic()
            popen = subprocess.Popen(
                [BIN / "xllm-serve", model, "--port", "0", *flags],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=env,
            )
        running.append(Process(popen, log, began))
        return running[-1]

    yield start
    for process in running:
        process.popen.kill()
        process.popen.wait()


@pytest.fixture(scope="session")
def real_server(real_artifact: Path, start_server: Starter) -> Process:
    """One server for every test that does not end it."""
    return start_server(real_artifact, "--timeout-receive", "3", "--threads", "1").wait_ready()
