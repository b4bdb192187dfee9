"""What all tests share: a store of compiled kernels, so that no worker, and no later run, compiles one again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from xllm_compiler.kernels.tir.native.objects import OBJECTS
from xllm_compiler.kernels.tir.native.store import ObjectStore


@pytest.fixture(scope="session", autouse=True)
def kernel_store(pytestconfig: pytest.Config) -> Iterator[None]:
    """Kernels that this process compiles, and commands that it starts, go to and come from `.cache/tests`."""
    root = pytestconfig.rootpath / ".cache" / "tests"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OBJECTS, "store", ObjectStore(root / "kernels"))
        patch.setenv("XLLM_CACHE_DIR", str(root))
        yield


@pytest.fixture
def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call to the end of the test every kernel is compiled anew, as by another process without a store."""

    def forget() -> None:
        monkeypatch.setattr(OBJECTS, "store", None)
        monkeypatch.setattr(OBJECTS, "_known", {})

    return forget
