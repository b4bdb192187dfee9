"""xllm-compiler: compiles Hugging Face checkpoints into artifacts and serves them.

    from xllm_compiler import LLM, SamplingParams

The public names are imported when they are first used, so that `import xllm_compiler` itself imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xllm_compiler.runtime.llm import LLM
    from xllm_compiler.runtime.pooling import PoolingParams
    from xllm_compiler.runtime.sampling_params import SamplingParams

__all__ = ["LLM", "PoolingParams", "SamplingParams"]
__version__ = "0.1.0"

_HOMES = {
    "LLM": "xllm_compiler.runtime.llm",
    "PoolingParams": "xllm_compiler.runtime.pooling",
    "SamplingParams": "xllm_compiler.runtime.sampling_params",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
