"""Laws that every pass keeps on random modules: what it leaves verifies, its claim is honest (the manager checks both),
it is deterministic and idempotent, and the function computes the same."""

from __future__ import annotations

import random

import pytest

from xllm_compiler.ir.clone import clone_module
from xllm_compiler.testing.graphs import random_module
from xllm_compiler.testing.xir import Case

PASSES = [
    "dce",
    "cse",
    "fold",
    "fuse-add-norm",
    "fuse-epilogue",
    "fuse-glu",
    "fuse-qkv",
    "fuse-kv-append",
    "fix(fold,cse,dce),fuse-glu,fuse-qkv,fuse-kv-append,fuse-epilogue,fuse-add-norm,fix(fold,cse,dce)",
]


@pytest.mark.parametrize("pipeline", PASSES)
@pytest.mark.parametrize("block", range(3))
def test_meaning_is_kept(pipeline: str, block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        module = random_module(random.Random(seed).randrange, size=20)
        case = Case(module, clone_module(module)).run(pipeline)
        # Without rounding: chains of exp and tanh blow up what two roundings or one make of a value.
        case.check_same(sizes=(1, 5), seed=seed, typed=False)
        text = case.text
        assert case.run(pipeline).text == text, f"seed {seed}: not idempotent"
        twin = Case(module, clone_module(module)).run(pipeline)
        assert twin.text == text
