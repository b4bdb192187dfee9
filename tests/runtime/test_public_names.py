"""`from xllm_compiler import LLM, SamplingParams`: the right objects, and nothing is imported before they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import xllm_compiler
from xllm_compiler.runtime import llm, sampling_params


def test_the_names_are_the_objects_themselves() -> None:
    from xllm_compiler import LLM, SamplingParams

    assert LLM is llm.LLM
    assert SamplingParams is sampling_params.SamplingParams
    assert set(xllm_compiler.__all__) <= set(dir(xllm_compiler))


def test_another_name_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="module 'xllm_compiler' has no attribute 'LLm'"):
        _ = xllm_compiler.LLm  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'Params'"):
        from xllm_compiler import Params  # type: ignore[attr-defined]  # noqa: F401


def test_importing_the_package_imports_nothing(tmp_path: Path) -> None:
    """And `SamplingParams` alone needs no engine."""
    code = (
        "import __future__, sys, typing; before = set(sys.modules); import xllm_compiler; dir(xllm_compiler);"
        "print(sorted(set(sys.modules) - before));"
        "from xllm_compiler import SamplingParams; print('xllm_compiler.runtime.engine' in sys.modules);"
        "from xllm_compiler import LLM; print([m for m in ('torch', 'tvm', 'starlette') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['xllm_compiler']", "False", "[]"]
