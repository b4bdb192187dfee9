"""What all tests share: a store of compiled kernels, so that no worker, and no later run, compiles one again; and a
list of the slowest files at the end, by the sum of what their tests took on all workers."""

from __future__ import annotations

from collections import Counter
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


_seconds: Counter[str] = Counter()
_SHOWN = 15


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file, _, rest = report.nodeid.partition("::")
    _seconds[f"{file} {rest.partition('::')[0]}" if file == "laws" else file] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _seconds.total() > 60:
        terminalreporter.write_line(f"slowest of {_seconds.total():.0f} s on all workers:")
        for file, seconds in _seconds.most_common(_SHOWN):
            terminalreporter.write_line(f"{seconds:8.1f} s  {file}")
