"""Reference execution of IR in numpy. The functions live in `run` (list order) and `streams` (random orders)."""

from xllm_compiler.interp.run import run, run_ranks, run_value, run_values
from xllm_compiler.interp.streams import run_interleaved, run_interleaved_ranks

__all__ = ["run", "run_interleaved", "run_interleaved_ranks", "run_ranks", "run_value", "run_values"]
