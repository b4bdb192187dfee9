"""Who runs an artifact: from a manifest's target kind to code that is loaded, and to executors.

`RuntimeTarget` is the runtime's half of a target; the compiler's is `xllm_compiler/targets/`. Ours are here by name;
an installed package offers one by an entry point of the group "xllm_compiler.runtime_targets", such as
`npu = "my_npu.serve:NpuRuntime"`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import Contents, Manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.plugins import Plugins
from xllm_compiler.runtime.executor import Executor

RUNTIME_TARGETS: Final = Plugins(
    "xllm_compiler.runtime_targets", "runtime target", {"cpu": "xllm_compiler.runtime.cpu.target:CpuRuntime"}
)

Files = Path | Contents
"""The folder of an artifact; `Contents` where what is read must be what the manifest says."""


class Code(Protocol):
    """An artifact's code, loaded for one level of this machine."""

    def executor(self, weights: NDArray[np.uint8], *, pages: int, threads: int) -> Executor:
        """Something that runs steps. `weights`: the mapped weights.bin, which must outlive it. `pages`: KV pages in the
        pool. Raises kind "capacity" where memory is lacking."""
        ...


class RuntimeTarget(ABC):
    """What the runtime asks of a target. It has no state: a subclass is made without arguments."""

    def check(self, manifest: Manifest) -> None:  # noqa: B027 (most have nothing to add)
        """Raise kind "artifact" where the manifest's target part is not as the compiler's half writes it. What any
        target must obey has been checked."""

    @abstractmethod
    def levels(self, manifest: Manifest) -> tuple[str, ...]:
        """Those of the artifact's levels that this machine can run, the best last. Raises kind "artifact", with the
        reason, where it can run none."""

    @abstractmethod
    def reads(self, level: str) -> tuple[str, ...]:
        """The files of the artifact that `load` reads for a level."""

    @abstractmethod
    def load(self, files: Files, manifest: Manifest, level: str) -> Code:
        """The code for a level that `levels` returned. Raises kind "artifact" where it is not what the manifest
        says."""


def runtime_target(manifest: Manifest) -> RuntimeTarget:
    """Who runs the artifact. Raises kind "artifact" where nobody who is installed does, or its target part is unsound;
    "option" where the package that does cannot be loaded."""
    kind = manifest.target.kind
    cls = RUNTIME_TARGETS.load(kind, RuntimeTarget)  # type: ignore[type-abstract]
    if cls is None:
        raise XllmError(
            "artifact",
            f"the artifact is for target {kind}, which nothing that is installed can run",
            where="manifest.json: $.target.kind",
            help=f"this machine has {', '.join(RUNTIME_TARGETS.names())}; install the package that offers {kind}, or "
            "compile the checkpoint for another target",
        )
    target = cls()
    target.check(manifest)
    return target


def choose_level(target: RuntimeTarget, manifest: Manifest, wanted: str | None = None) -> str:
    """The best level that this machine can run, or the one that is `wanted`. Raises kind "artifact" where there is none
    at all, "option" where it is not the wanted one."""
    here = target.levels(manifest)
    if wanted is None:
        return here[-1]
    if wanted not in here:
        raise XllmError(
            "option", f"level {wanted!r} cannot run here", help=f"this artifact and machine: {', '.join(here)}"
        )
    return wanted
