"""The CPU target: an artifact's native code on a team of threads. `target` is what the runtime knows of it."""

from xllm_compiler.runtime.cpu.executor import CpuExecutor
from xllm_compiler.runtime.cpu.team import Team

__all__ = ["CpuExecutor", "Team"]
