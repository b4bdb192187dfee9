"""Compiles each kernel to an object file of its own, once for a process, or once for all that share a store on disk.

Kernels are not inlined into the step, a function with hundreds of calls. It would get so long that LLVM's register
allocation takes ten times as long as all kernels together. And a kernel of its own is compiled in parallel with others,
and used again.

The workers are forked processes, not threads: TVM's code generator sets LLVM's options for the whole process while it
runs, so threads would change each other's code.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import struct
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NoReturn

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.isa.levels import Isa
from xllm_compiler.kernels.tir.native.store import ObjectStore

C_CALL: Final = 1
"""TVM's "kCPackedFunc": such a function keeps the signature it has and is exported under its own name."""

Job = tuple[Kernel, Isa]

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_JOB: Final = struct.Struct("<I")  # how a job's number travels to the workers; a pipe holds 16,384 of them
_OS_ERROR: Final = 100  # added to an errno, the exit status of a worker that the file system refused something
_PIPE_JOBS: Final = 65536 // _JOB.size


def make_object(functions: dict[Any, Any], isa: Isa) -> bytes:
    """TensorIR functions (by `tvm.ir.GlobalVar`) as one ELF object."""
    # Imported here and below, so that a process that only names the store does not wait for TVM.
    import tvm
    from tvm import tirx
    from tvm.tirx.build import codegen_build

    target = tvm.target.Target(isa.target())
    module = tvm.IRModule(functions)
    # Only what code generation needs: kernels use flat buffers, and LLVM simplifies. TVM's simplifier takes minutes
    # over an unrolled tile. Its FlattenBuffer makes vector indices sums, which are then computed lane by lane.
    for transform in (tirx.transform.BindTarget(target.with_host(target)), tirx.transform.LowerIntrin()):
        module = transform(module)
    return object_of(codegen_build(module, target))


def object_of(module: Any) -> bytes:
    """The ELF object of a TVM module. TVM can only write files, and LLVM ends the process when a disk is full; so the
    file is in memory."""
    fd = os.memfd_create("kernel.o")
    try:
        module.write_to_file(f"/proc/self/fd/{fd}", "o")
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def compile_kernel(kernel: Kernel, isa: Isa) -> bytes:
    """The object of one kernel, whose only global symbol is `kernel.symbol`; the same bytes every time."""
    import tvm

    function = kernel.build(isa).with_attr({"calling_conv": C_CALL, "global_symbol": kernel.symbol})
    return make_object({tvm.ir.GlobalVar(kernel.symbol): function}, isa)


class KernelObjects:
    """Objects of kernels. They are kept in memory, and in `store`, if there is one, for other processes."""

    def __init__(self, store: ObjectStore | None = None) -> None:
        self.store = store
        self._known: dict[Job, bytes] = {}

    def get(self, kernel: Kernel, isa: Isa) -> bytes:
        """The kernel's object, compiled now if it is not there yet."""
        job = kernel, kernel.level(isa)
        found = self._find(job)
        if found is None:
            found = compile_kernel(*job)
            self._keep(job, found)
        return found

    def _find(self, job: Job) -> bytes | None:
        found = self._known.get(job)
        if found is None and self.store is not None:
            found = self.store.get(*job)
            if found is not None:
                self._known[job] = found
        return found

    def _keep(self, job: Job, data: bytes) -> None:
        self._known[job] = data
        if self.store is not None:
            self.store.put(*job, data)

    @contextmanager
    def compiling(self, jobs: Sequence[Job], workers: int) -> Iterator[None]:
        """Compiles those of `jobs` that are missing, in `workers` other processes, while the body of the context runs
        here. All are compiled when the context ends. Raises what compiling one of them raised. The workers end if the
        body raises."""
        wanted = dict.fromkeys((kernel, kernel.level(isa)) for kernel, isa in jobs)
        missing = [job for job in wanted if self._find(job) is None][:_PIPE_JOBS]
        if not missing:
            yield
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            children = _fork(missing, min(workers, len(missing)), folder)
            try:
                yield
                failed = [_wait(children) for _ in range(len(children))]
            finally:
                for child in children:
                    os.kill(child, signal.SIGKILL)
                while children:
                    _wait(children)
            for error in sorted(folder.glob("*.error")):
                kind, message, where, help = json.loads(error.read_text())
                raise XllmError(kind, message, where=where, help=help)
            if any(failed):
                status = next(filter(None, failed))
                if status >= _OS_ERROR:
                    number = status - _OS_ERROR
                    raise OSError(number, os.strerror(number), name)
                raise XllmError(
                    "internal",
                    f"a process that compiles kernels ended with status {status}",
                    help="a status of -9: the machine has too little memory" if status == -9 else "",
                )
            for i, job in enumerate(missing):
                self._keep(job, (folder / f"{i}.o").read_bytes())


OBJECTS: Final = KernelObjects()
"""The objects of this process: the next artifact has many of the same kernels."""


def _fork(jobs: Sequence[Job], workers: int, folder: Path) -> list[int]:
    """Starts `workers` processes. Each takes the next job's number from one pipe, and writes `<number>.o` or
    `<number>.error` to `folder`. It ends when the pipe is empty, or when this process ends."""
    source, sink = os.pipe()
    parent = os.getpid()
    children: list[int] = []
    try:
        os.write(sink, b"".join(_JOB.pack(i) for i in range(len(jobs))))
        os.close(sink)
        for _ in range(workers):
            child = os.fork()
            if not child:
                _work(jobs, source, folder, parent)
            children.append(child)
    finally:
        os.close(source)
    return children


def _work(jobs: Sequence[Job], source: int, folder: Path, parent: int) -> NoReturn:
    """Runs a worker. It ends with `_exit`, which touches nothing that its parent has open or registered. It has
    inherited the parent's locks; so if the parent is killed, the system must end the worker too."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent was killed before prctl took effect
            os._exit(status)
        while number := os.read(source, _JOB.size):
            (i,) = _JOB.unpack(number)
            try:
                (folder / f"{i}.o").write_bytes(compile_kernel(*jobs[i]))
            except OSError:
                raise
            except Exception as error:
                (folder / f"{i}.error").write_text(json.dumps(_told(error, jobs[i])))
        status = 0
    except OSError as error:  # perhaps a full disk, where a message could not be written either
        status = _OS_ERROR + (error.errno or errno.EIO)
    finally:
        os._exit(status)


def _told(error: Exception, job: Job) -> tuple[str, str, str, str]:
    if isinstance(error, XllmError):
        return error.kind, error.message, error.where, error.help
    return "internal", "".join(traceback.format_exception(error)), f"{job[0].symbol} for {job[1].name}", ""


def _wait(children: list[int]) -> int:
    """Waits for the first of `children`, and removes it from the list. Returns its exit status, negative for a
    signal."""
    child = children[0]
    status = 0
    with suppress(ChildProcessError):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    children.remove(child)
    return status
