"""`xllm-new-pass`: the files of a new pass, in anyone's directory. Owns names and what is never overwritten, not the
texts, which are in new_pass_text.py."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Sequence
from configparser import ConfigParser
from configparser import Error as ConfigError
from pathlib import Path

from xllm_compiler.errors import XllmError
from xllm_compiler.tools.arguments import Arguments
from xllm_compiler.tools.console import run

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST = 60

_EPILOG = """\
writes NAME.py, tests/passes/NAME/{fires,unchanged,error}.xir and, where there is no pytest configuration, a pytest.ini
that lets `pytest` find the pass: it then runs the tests and holds the pass to the laws that every pass must keep."""


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the tool and return its exit code: 0, 2 (bad input; then nothing has been written)."""
    return run(lambda: _main(list(argv)))


def _main(argv: list[str]) -> int:
    parser = Arguments("xllm-new-pass", "Start a compiler pass: a skeleton that works, and its tests.", epilog=_EPILOG)
    parser.add_argument("name", metavar="NAME", help="verb-noun in kebab-case, such as fuse-norm")
    parser.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="default: the current directory")
    args = parser.read(argv)
    name, root = check_name(args.name), args.dir
    if not root.is_dir():
        raise XllmError("io", f"there is no directory {root}", help="make it first")
    from xllm_compiler.tools.new_pass_text import files

    stem = name.replace("-", "_")
    texts = {f"{stem}.py": files(name)["pass"]}
    texts |= {f"tests/passes/{name}/{case}.xir": files(name)[case] for case in ("fires", "unchanged", "error")}
    config = find_config(root)
    if config is None:
        texts["pytest.ini"] = f"[pytest]\ntestpaths = tests\nxllm_passes =\n    {stem}.py\n"
    _write(root, texts)
    print("\n".join(f"wrote {root / path}" for path in texts))
    print(_next_steps(name, root, root / f"{stem}.py", config))
    return 0


def check_name(name: str) -> str:
    """The name, if a pass and its Python file can be called so; XllmError proposes a better one."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        words = re.sub(r"([a-z0-9])([A-Z])", r"\1-\2", name).lower()
        better = re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:_LONGEST].strip("-")
        help = f"did you mean {better}?" if _NAME.fullmatch(better) and better != name else "such as fuse-norm"
        raise XllmError("option", f"{name!r} is not a pass name: lower case, words joined by -", help=help)
    stem = name.replace("-", "_")
    if keyword.iskeyword(stem) or stem in sys.stdlib_module_names or name == "fix":
        what = "a word of the pipeline syntax" if name == "fix" else "taken by Python itself"
        raise XllmError("option", f"{name!r} is {what}", help=f"say what it does to what, such as {name}-norm")
    from xllm_compiler.passes.registry import pass_names

    if name in pass_names():
        raise XllmError("option", f"there is a pass called {name!r}", help=f"xllm-opt --help-pass {name} tells of it")
    return name


def find_config(root: Path) -> Path | None:
    """The file from which pytest takes its settings when it is started in `root`: there, or in a directory above."""
    for folder in (root.resolve(), *root.resolve().parents):
        for file in ("pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg"):
            if (folder / file).is_file() and _configures(folder / file):
                return folder / file
    return None


def _configures(path: Path) -> bool:
    """Whether pytest would stop at this file. A file that cannot be read is pytest's to complain about."""
    if path.name.endswith("pytest.ini"):
        return True
    try:
        if path.name == "pyproject.toml":
            import tomllib

            return "pytest" in tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
        parser = ConfigParser(interpolation=None)
        parser.read_string(path.read_text(encoding="utf-8"))
        return parser.has_section("pytest" if path.name == "tox.ini" else "tool:pytest")
    except (OSError, ValueError, ConfigError):
        return False


def _write(root: Path, texts: dict[str, str]) -> None:
    """Every file, or none where one of them is there already."""
    there = [str(root / path) for path in texts if (root / path).exists() or (root / path).is_symlink()]
    if there:
        help = "nothing was written; choose another name, or remove what is in the way"
        raise XllmError("io", f"already there: {', '.join(there)}", help=help)
    for path, text in texts.items():
        try:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            with (root / path).open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise XllmError("io", f"cannot write {root / path}: {error.strerror}") from None


def _next_steps(name: str, root: Path, file: Path, config: Path | None) -> str:
    test = root / "tests" / "passes" / name / "fires.xir"
    lines = ["", "next:"]
    if config is not None:
        lines += [f"  {line}" for line in _setting(config, file)]
    go = "" if root == Path() else f"cd {root} && "
    return "\n".join(
        [
            *lines,
            f"  {go}pytest    # the tests, and the laws that every pass must keep",
            f"  xllm-opt {test} --load {file} -p {name} --diff",
            f"  then change {file} into what you want, and the tests with it",
        ]
    )


def _setting(config: Path, file: Path) -> list[str]:
    """What to write into pytest's settings so that it finds the pass."""
    full = file.resolve()
    inside = full.is_relative_to(config.parent)
    shown = full.relative_to(config.parent).as_posix() if inside else full.as_posix()
    toml = config.name == "pyproject.toml"
    if "xllm_passes" in config.read_text(encoding="utf-8"):
        return [f"add to the list xllm_passes in {config}:", f'    "{shown}",' if toml else f"    {shown}"]
    if toml:
        return [f"add to [tool.pytest.ini_options] in {config}:", f'    xllm_passes = ["{shown}"]']
    section = "tool:pytest" if config.name == "setup.cfg" else "pytest"
    return [f"add to [{section}] in {config}:", f"    xllm_passes = {shown}"]
