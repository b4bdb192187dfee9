"""The pytest plugin, found through the entry point `xllm`. Owns collection and reports; what a test means is up to
filetest.py and laws.py.

    pytest tests/passes/fuse-glu       every .xir file there that has directives: FILE.xir::RUN-1 ..
    pytest --bless FILE.xir            writes the CHECK lines that follow `// BLESS`
    pytest                             and the laws of every pass that the ini names: laws::fuse-glu::meaning ..
    pytest --laws, --laws=fuse-glu     the laws of all of them, or of one, whatever else is asked for
    pytest --laws=cse --laws-preset=@npu            at the points of another target's preset

    [tool.pytest.ini_options]
    xllm_passes = ["my_package.passes", "more/my_pass.py"]      # modules, or files as seen from the rootdir

Where a project has no .xir file and no such setting, nothing of ours is imported but this file.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xllm_compiler.testing.filetest import FileTest

OURS = "xllm_compiler.passes"
"""In the ini: every pass that we ship."""
_PASSES = pytest.StashKey[list[str]]()
_JUDGED = pytest.StashKey[dict[str, str]]()
_LAWS = "xllm_laws"  # what a worker of pytest-xdist is told


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("xllm", "compiler passes")
    group.addoption("--bless", action="store_true", help="write the CHECK lines that follow // BLESS in .xir tests")
    group.addoption(
        "--laws",
        nargs="?",
        const="",
        metavar="PASS",
        help="hold every pass of xllm_passes, or --laws=PASS, to the laws; the default where no path is given",
    )
    group.addoption(
        "--laws-preset",
        metavar="@PRESET",
        help="the preset of the target for which passes are held to the laws; default that of xllm-compile",
    )
    parser.addini("xllm_passes", "modules or .py files that register compiler passes", type="linelist", default=[])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "laws: a law that a compiler pass is held to")


# ---------------------------------------------------------------------------------------------------------- file tests


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix != ".xir":
        return None
    from xllm_compiler.testing.directives import holds_directives

    text = file_path.read_bytes().decode("utf-8", "replace")
    return XirFile.from_parent(parent, path=file_path) if holds_directives(text) else None


class XirFile(pytest.File):
    """An item per RUN line; one alone that fails for a file whose directives are wrong."""

    def collect(self) -> Iterable[pytest.Item]:
        from xllm_compiler.errors import XllmError
        from xllm_compiler.testing.filetest import FileTest

        try:
            test = FileTest.read(_shown(self.path, self.config))
        except XllmError as e:
            yield BrokenFile.from_parent(self, name="directives", text=str(e))
            return
        for index in range(1 if self.config.getoption("bless") else len(test.directives.runs)):
            yield RunLine.from_parent(self, name=f"RUN-{index + 1}", test=test, index=index)


class RunLine(pytest.Item):
    """One RUN line with everything that is expected of it; with --bless, the whole file."""

    def __init__(self, *, test: FileTest, index: int, **rest: Any) -> None:
        super().__init__(**rest)
        self.test, self.index = test, index

    def runtest(self) -> None:
        from xllm_compiler.testing.bless import bless

        blessing = self.config.getoption("bless")
        failures = bless(self.test.path) if blessing else self.test.run(self.index)
        if failures:
            raise _Failed("\n\n".join(map(str, failures)))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        run = self.test.directives.runs[self.index]
        return _report(self, excinfo, f"\n\nRUN: {run.text}\nin   {self.test.path}:{run.line}")

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.test.directives.runs[self.index].line - 1, f"{self.path.name} {self.name}"


class BrokenFile(pytest.Item):
    """A file of which nothing can be run, and why."""

    def __init__(self, *, text: str, **rest: Any) -> None:
        super().__init__(**rest)
        self.text = text

    def runtest(self) -> None:
        raise _Failed(self.text)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} {self.name}"

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return _report(self, excinfo)


class _Failed(Exception):
    """The text of a failed test, without a traceback."""


def _report(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException], more: str = "") -> Any:
    if isinstance(excinfo.value, _Failed):
        return f"{excinfo.value}{more}"
    return pytest.Item.repr_failure(item, excinfo)


def _shown(path: Path, config: pytest.Config) -> str:
    """The path as messages show it: from the working directory where that is possible."""
    try:
        return str(path.relative_to(config.invocation_params.dir))
    except ValueError:
        return str(path)


# ----------------------------------------------------------------------------------------------------------- the passes


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Loads the passes that the ini names, so that every test below may use them."""
    specs = session.config.getini("xllm_passes")
    session.config.stash[_PASSES] = names = []
    for spec in specs:
        names += [name for name in _load(spec, session.config) if name not in names]


def _load(spec: str, config: pytest.Config) -> list[str]:
    from xllm_compiler.errors import XllmError
    from xllm_compiler.passes.registry import BUILTIN, load_passes, pass_class

    try:
        if spec == OURS:
            return [pass_class(name).name for name in BUILTIN]
        return load_passes(str(config.rootpath / spec) if spec.endswith(".py") else spec)
    except XllmError as e:
        raise pytest.UsageError(f"xllm_passes: {spec}\n{e}") from e


# ------------------------------------------------------------------------------------------------------------- the laws


def _wanted(config: pytest.Config) -> str | None:
    """A pass's name, "" for the laws of all passes, or None: no laws in this run."""
    told: dict[str, Any] = getattr(config, "workerinput", {})
    if _LAWS in told:
        return told[_LAWS]  # type: ignore[no-any-return]
    asked: str | None = config.getoption("laws")
    if asked is not None or config.args_source is pytest.Config.ArgsSource.ARGS or config.getoption("bless"):
        return asked
    return ""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A worker of pytest-xdist gets the paths of the ini as if they had been asked for; so it is told what was."""
    node.workerinput[_LAWS] = _wanted(node.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The laws come last in the session, as if they stood in a file of their own."""
    report = yield
    if isinstance(collector, pytest.Session) and (names := _to_judge(collector.config)):
        report.result.append(Laws.from_parent(collector, name="laws", nodeid="laws", passes=names))
    return report


def _to_judge(config: pytest.Config) -> list[str]:
    wanted = _wanted(config)
    if wanted is not None:
        _check_preset(config.getoption("laws_preset"))
    if not wanted:
        return [] if wanted is None else config.stash.get(_PASSES, [])
    from xllm_compiler.errors import XllmError
    from xllm_compiler.passes.registry import pass_class

    try:
        return [pass_class(wanted).name]
    except XllmError as e:
        raise pytest.UsageError(f"--laws={wanted}: the option takes the word behind it as a pass\n{e}") from e


def _check_preset(name: str | None) -> None:
    """Raises UsageError for a preset that no installed target has."""
    if name is None:
        return
    from xllm_compiler.errors import XllmError
    from xllm_compiler.passes.presets import all_presets, preset

    try:
        if name[:1] != "@" or preset(name[1:]) is None:
            known = ", ".join(f"@{known}" for known in all_presets()[0])
            raise pytest.UsageError(f"--laws-preset={name}: no installed target has such a preset\n  help: {known}")
    except XllmError as e:
        raise pytest.UsageError(f"--laws-preset={name}\n{e}") from e


def _inputs(session: pytest.Session) -> tuple[Path, ...]:
    """Folders whose modules passes are tried on besides the shipped corpus: those of the ini's testpaths, or of the
    file tests at hand, without folders inside others."""
    config = session.config
    texts = [path for text in config.getini("testpaths") for path in sorted(glob(text, root_dir=config.rootpath))]
    found = [config.rootpath / text for text in texts]
    found = found or [item.path.parent for item in session.items if isinstance(item, RunLine)]
    folders = [path for path in dict.fromkeys(found) if path.is_dir()]
    return tuple(Path(_shown(f, config)) for f in folders if not any(o in f.parents for o in folders))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How much the laws had to look at: one that was never tried on what matters says nothing."""
    for line in terminalreporter.config.stash.get(_JUDGED, {}).values():
        terminalreporter.write_line(f"laws of {line}")


class Laws(pytest.Collector):
    """All laws, below the session."""

    def __init__(self, *, passes: list[str], **rest: Any) -> None:
        super().__init__(**rest)
        self.passes = passes

    def collect(self) -> Iterator[pytest.Collector]:
        folders = _inputs(self.session)
        for name in self.passes:
            yield OfPass.from_parent(self, name=name, folders=folders)


class OfPass(pytest.Collector):
    """The laws of one pass."""

    def __init__(self, *, folders: tuple[Path, ...], **rest: Any) -> None:
        super().__init__(**rest)
        self.folders = folders

    def collect(self) -> Iterator[pytest.Item]:
        from xllm_compiler.testing import laws

        for law in laws.law_names():
            item: pytest.Item = LawItem.from_parent(self, name=law, folders=self.folders)
            item.add_marker(pytest.mark.laws)
            if self.config.pluginmanager.hasplugin("xdist"):  # the laws of one pass share one run of it
                item.add_marker(pytest.mark.xdist_group(f"laws::{self.name}"))
            yield item


class LawItem(pytest.Item):
    """One law of one pass, over the corpus."""

    def __init__(self, *, folders: tuple[Path, ...], **rest: Any) -> None:
        super().__init__(**rest)
        self.folders = folders

    def runtest(self) -> None:
        from xllm_compiler.testing import laws
        from xllm_compiler.testing.laws_inputs import PRESET

        assert self.parent is not None
        preset = self.config.getoption("laws_preset") or PRESET
        report = laws.check(self.parent.name, self.name, self.folders, preset)
        tally = laws.tally(self.parent.name, self.folders, preset)
        self.config.stash.setdefault(_JUDGED, {})[self.parent.name] = tally
        if report is not None:
            raise _Failed(report)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return _report(self, excinfo)

    def reportinfo(self) -> tuple[Path, None, str]:
        assert self.parent is not None
        return self.session.config.rootpath, None, f"laws::{self.parent.name}::{self.name}"
