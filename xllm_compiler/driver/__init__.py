"""From a checkpoint to an artifact. `compile` is the whole way in order; each phase is one function of `phases`.

`key` says what decides the result, `manifest` turns what the phases found into a manifest."""

from xllm_compiler.driver.compile import CompileReport, compile_checkpoint
from xllm_compiler.driver.key import Request, read_request

__all__ = ["CompileReport", "Request", "compile_checkpoint", "read_request"]
