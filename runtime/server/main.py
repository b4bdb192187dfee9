"""`xllm-serve`: from a command line to a listening server. Owns the order of the start; what it starts is elsewhere.

Imports at the top are those that parsing the command line needs; the web stack is imported in a thread while the
artifact is read and checked.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.phases import Phases
from xllm_compiler.runtime.server.keys import load_keys
from xllm_compiler.runtime.server.outlets import drain_outlets, outlets
from xllm_compiler.runtime.server.settings import Settings, parse_settings
from xllm_compiler.runtime.server.sockets import bind, doors, raise_open_file_limit

if TYPE_CHECKING:
    import socket

    from xllm_compiler.runtime.chat_template import ChatTemplate
    from xllm_compiler.runtime.profile.profiler import Profiler
    from xllm_compiler.runtime.server.context import Context
    from xllm_compiler.runtime.startup import Started

log = logging.getLogger("xllm.server")

_STOP_SECONDS = 10.0  # for the engine's thread to end; it may be inside a step
_WEB_STACK = ("uvloop", "xllm_compiler.runtime.server.lifecycle", "xllm_compiler.runtime.server.app")


def entry() -> None:
    """The console script."""
    with outlets():
        _end_when_told()
        try:
            code = main(sys.argv[1:])
        except Exception:  # the interpreter would tell of it where that may block
            traceback.print_exc()
            code = 1
    sys.exit(code)


def _end_when_told() -> None:
    """Until the server listens, a signal ends the process at once.

    The system does that by itself, except for a container's first process. KeyboardInterrupt would not do: a library
    that is being imported or called may swallow it, and the server would go on to serve.
    """
    for sig in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(sig) not in (signal.SIG_DFL, signal.default_int_handler):
            continue  # nohup: to be ignored
        if os.getpid() == 1:
            signal.signal(sig, lambda number, frame: os._exit(128 + number))
        else:
            signal.signal(sig, signal.SIG_DFL)


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; the process' exit code: 0 after draining, 2 for bad input, 1 for a fault of ours."""
    phases = Phases.since_process_start()
    phases.mark("start python")
    try:
        settings = parse_settings(argv, os.environ)
        os.environ.pop("XLLM_API_KEY", None)  # the compiler, a child process, has no use for it
        os.environ.pop("XLLM_API_KEY_FILE", None)
        return _serve(settings, phases)
    except XllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _serve(settings: Settings, phases: Phases) -> int:
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn").setLevel(logging.DEBUG if settings.log_level == "debug" else logging.WARNING)
    keys = load_keys(settings)
    sock = bind(settings.host, settings.port)
    web = _Importer(_WEB_STACK)
    web.start()
    template = None
    try:
        started = _prepare(settings, phases)
        template = _chat_template(settings, started)
        if template is not None:
            template.start()  # it gets ready while the web server does
        web.wait()
        phases.mark("import web server")
        if template is not None and settings.chat_template is not None:
            template.check()  # the model's own was checked while compiling
            phases.mark("parse chat template")
        return _listen(settings, keys, phases, started, template, sock)
    finally:
        sock.close()
        if template is not None:
            template.close()


class _Importer(threading.Thread):
    """Imports modules beside other work."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(name="xllm-import", daemon=True)
        self._names = names
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            for name in self._names:
                importlib.import_module(name)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error


def _prepare(settings: Settings, phases: Phases) -> Started:
    """The artifact, compiled first if need be, loaded into an engine."""
    from xllm_compiler.runtime.resolve import resolve_artifact
    from xllm_compiler.runtime.startup import EngineOptions, prepare_engine

    options = EngineOptions(
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
        threads=settings.threads,
        max_body_size=settings.max_body_size,
    )
    phases.mark("import runtime")
    compiled: list[str] = []

    def tell(line: str) -> None:
        compiled.append(line)
        print(line, flush=True)

    path = resolve_artifact(Path(settings.model), compile_options=_compile_options(settings), tell=tell)
    phases.mark("compile checkpoint" if compiled else "find artifact")
    return prepare_engine(path, options, phases, _profiler(settings))


def _profiler(settings: Settings) -> Profiler | None:
    if settings.profile_steps is None:
        if settings.profile_trace is not None:
            raise XllmError("option", "--profile-trace needs --profile-steps", help="say how many steps to profile")
        return None
    from xllm_compiler.runtime.profile.profiler import Profiler

    trace = None if settings.profile_trace is None else Path(settings.profile_trace)
    return Profiler(settings.profile_steps, lambda text: print(text, flush=True), trace=trace)


def _compile_options(settings: Settings) -> list[str]:
    """What a checkpoint must be compiled for so that these settings can be served."""
    options: list[str] = []
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "cache_dir"):
        value = getattr(settings, name)
        if value is not None:
            options += ["--" + name.replace("_", "-"), str(value)]
    return options


def _chat_template(settings: Settings, started: Started) -> ChatTemplate | None:
    """The one that is served: the user's or the model's own."""
    from xllm_compiler.runtime.chat_template import ChatTemplate

    tokenizer = started.tokenizer
    if settings.chat_template is None:
        return tokenizer.chat_template if tokenizer is not None and tokenizer.has_chat_template else None
    try:
        text = Path(settings.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise XllmError("option", f"cannot read the chat template: {error}", where="--chat-template") from None
    return ChatTemplate(text, {} if tokenizer is None else tokenizer.special_tokens)


def _context(settings: Settings, started: Started, template: ChatTemplate | None) -> Context:
    from xllm_compiler import __version__
    from xllm_compiler.runtime.memory import TEXT_FACTOR
    from xllm_compiler.runtime.sampling_params import SamplingParams
    from xllm_compiler.runtime.server.budget import Budget
    from xllm_compiler.runtime.server.context import Context
    from xllm_compiler.runtime.server.engine_client import EngineClient
    from xllm_compiler.runtime.server.lifecycle import health_check
    from xllm_compiler.runtime.server.metrics import Metrics

    if started.tokenizer is None:
        raise XllmError("artifact", "the artifact has no tokenizer.json, without which no text can be served")
    defaults = dict(started.sampling_defaults) if settings.generation_config == "auto" else {}
    try:
        SamplingParams(**defaults)
    except XllmError as error:
        raise XllmError(
            "artifact",
            f"generation_config.json: {error.message}",
            help="correct it and compile again, or serve with --generation-config vllm",
        ) from None
    names = settings.served_model_names or (started.model_info.name,)
    metrics = Metrics(names[0])
    return Context(
        tokenizer=started.tokenizer,
        model_info=started.model_info,
        engine_client=EngineClient(
            started.engine,
            metrics,
            started.model_info.max_num_seqs + settings.max_waiting_requests,
            started.memory_plan.fixed.requests,
        ),
        metrics=metrics,
        names=names,
        defaults=defaults,
        health=health_check(started.engine),
        version=__version__,
        pool_tokens=started.memory_plan.pages * started.memory_plan.page_tokens,
        template=None if settings.chat_template is None else template,
        max_body_size=settings.max_body_size,
        budget=Budget(settings.max_body_memory),
        max_text=started.memory_plan.fixed.text // TEXT_FACTOR,
        receive_timeout=settings.timeout_receive,
    )


def _listen(
    settings: Settings,
    keys: tuple[str, ...],
    phases: Phases,
    started: Started,
    template: ChatTemplate | None,
    sock: socket.socket,
) -> int:
    from xllm_compiler.runtime import host
    from xllm_compiler.runtime.memory import show_bytes
    from xllm_compiler.runtime.server import engine_metrics
    from xllm_compiler.runtime.server.access import Cors, hosts_for
    from xllm_compiler.runtime.server.app import build_app
    from xllm_compiler.runtime.server.connection_guard import ConnectionGuard
    from xllm_compiler.runtime.server.lifecycle import Server, make_config

    ctx = _context(settings, started, template)
    guard = ConnectionGuard(raise_open_file_limit(), settings.timeout_receive, ctx.budget)
    cors = Cors(
        settings.allowed_origins, settings.allowed_methods, settings.allowed_headers, settings.allow_credentials
    )
    hosts = hosts_for(settings.host, settings.allowed_hosts, keys=bool(keys))
    app = build_app(ctx, keys, hosts=hosts, cors=cors, access_log=not settings.disable_access_log)
    config = make_config(
        app,
        guard,
        keep_alive=settings.timeout_keep_alive,
        certfile=settings.ssl_certfile,
        keyfile=settings.ssl_keyfile,
    )
    started.engine.start()

    def ready() -> None:
        phases.mark("listen")
        memory = started.memory_plan.entries()
        ctx.metrics.sources += [
            engine_metrics.engine_samples(started.engine),
            engine_metrics.connection_samples(guard),
            engine_metrics.log_samples(),
            engine_metrics.start_samples(started.model_info, memory, started.memory_plan.pages, dict(phases.rows)),
        ]
        host, port = sock.getsockname()[:2]
        scheme = "https" if settings.ssl_certfile else "http"
        address = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        if settings.startup_report is not None:
            _write_report(settings.startup_report, phases, started, address)
        print(f"start-up\n{phases.table()}")
        print(f"limits: {show_bytes(ctx.budget.limit)} of arriving requests, {guard.max_connections} connections")
        print(f"serving {', '.join(ctx.names)} on {address}", flush=True)
        gc.collect()
        gc.freeze()  # what the start made stays; collections need not look at it again
        # A large answer is 100,000 objects without a cycle: looking through all of them held everybody up for 20 ms.
        gc.set_threshold(20_000, 50, 100)

    server = Server(config, ctx, settings.timeout_graceful_shutdown, ready)
    bad: list[XllmError] = []

    def check_rest() -> None:
        # Until the weights are checked the engine tells no token, so a damaged artifact is never heard.
        try:
            started.artifact.wait_checked()
            if template is not None:
                template.check()
        except XllmError as error:
            bad.append(error)
            server.should_exit = True
            return
        weights = started.artifact.weights
        huge = host.huge_bytes(weights.ctypes.data)
        held = f"{show_bytes(weights.nbytes)}, of which huge pages hold {show_bytes(huge)}"
        print(f"weights: {held}; {started.artifact.guard.describe()}", flush=True)

    threading.Thread(target=check_rest, name="xllm-wait-check", daemon=True).start()
    server.run(doors(sock))
    code = _stop(started)
    if bad:
        raise bad[0]
    return code


def _write_report(path: str, phases: Phases, started: Started, address: str) -> None:
    report = {
        "phases": [{"name": name, "seconds": seconds} for name, seconds in phases.rows],
        "total_seconds": phases.total,
        "address": address,
        "artifact": started.model_info.artifact_id,
        "threads": started.threads,
        "memory_bytes": dict(started.memory_plan.entries()),
    }
    try:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        log.error("cannot write the start-up report to %s: %s", path, error.strerror)


def _stop(started: Started) -> int:
    """Stop the engine; a step that never ends must not keep the process alive."""
    stopper = threading.Thread(target=started.engine.stop, name="xllm-stop", daemon=True)
    stopper.start()
    stopper.join(_STOP_SECONDS)
    if stopper.is_alive():
        log.error("the engine did not stop within %.0f s", _STOP_SECONDS)
        drain_outlets()
        os._exit(1)
    return 0
