"""Reference execution of IR in numpy. The functions live in `run`."""

from xllm_compiler.interp.run import run, run_ranks, run_value

__all__ = ["run", "run_ranks", "run_value"]
