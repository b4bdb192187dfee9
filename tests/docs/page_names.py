"""What a page names: files, links, commands with their flags, make targets, modules, environment variables. And which
of those do not exist."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from xllm_compiler.tools.compile import VERBS

ROOT = Path(__file__).resolve().parents[2]
_SKIPPED = {".git", ".venv", ".cache", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"}
_SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
_OF_OTHERS = {
    *("--index-url", "--dist", "--durations"),  # pip, pytest-xdist, pytest
    *("--check-prefix", "--match-full-lines", "--strict-whitespace"),  # filecheck
}
"""Flags of other people's programs that pages name by themselves."""
_OF_READERS = {"FILE.py", "my_pass.py", "fold_scale.py", "wrong.py", "lit.cfg.py", "pytest.ini"}
"""Files that a page asks its reader to write."""


@functools.cache
def tree() -> tuple[str, ...]:
    """Every file and folder of the repository, as paths from its root, by their real places."""
    found = []
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in _SKIPPED and not name.endswith(".egg-info")]
        inside = Path(folder).relative_to(ROOT)
        found += [(inside / name).as_posix() for name in [*files, *names]]
    return tuple(found)


@functools.cache
def folders() -> frozenset[str]:
    """The names with which a path in the repository may begin: folders at the root or in a package of ours."""
    found = (Path(path) for path in tree() if "." not in Path(path).name and (ROOT / path).is_dir())
    return frozenset(
        path.name for path in found if len(path.parts) <= 2 or path.parts[0] in ("kernels", "xllm_compiler")
    )


def is_path(word: str) -> bool:
    """Whether a word in code claims to be a file or folder of the repository."""
    if not re.fullmatch(r"[\w.*<>/-]+", word) or word.startswith(("/", "-", ".", "http")):
        return False
    if word.rpartition("/")[2] in _OF_READERS or "fold-scale" in word or word.endswith(".so"):
        return False  # what a reader writes, or what a compile does
    if word.endswith((".py", ".md")) and "<" not in word:
        return True
    return "/" in word.rstrip("/") + ("/" if word.endswith("/") else "") and word.split("/")[0] in folders()


def exists(word: str) -> bool:
    """A path as pages write it: from the root, from a package, or only its end; `*` and `<name>` stand for anything."""
    end = re.sub(r"<\w+>", "*", word.rstrip("/")).removeprefix("xllm_compiler/")
    if "*" not in end:
        return any(path == end or path.endswith("/" + end) for path in tree())
    wanted = re.compile(r"(.*/)?" + re.escape(end).replace(r"\*", "[^/]*"))
    return any(map(wanted.fullmatch, tree()))


@functools.cache
def help_of(tool: str, verb: str = "") -> str:
    """What a console script of ours prints for --help."""
    module, _, _ = _SCRIPTS[tool].partition(":")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*([verb] if verb else []), "--help"])
    assert "usage" in printed.getvalue(), f"{tool} {verb} --help prints no usage"
    return printed.getvalue()


def _flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


@functools.cache
def flags_of(tool: str, verb: str = "") -> frozenset[str]:
    return frozenset(_flags(help_of(tool, verb)))


@functools.cache
def flags_of_script(path: str) -> frozenset[str]:
    """The flags that a program in the tree declares, read off its source."""
    return frozenset(re.findall(r"\"(--[a-z][a-z0-9-]*)\"", (ROOT / path).read_text(encoding="utf-8")))


@functools.cache
def all_flags() -> frozenset[str]:
    """Every flag of ours, of any program, and those of others that pages name alone."""
    found: set[str] = set(_OF_OTHERS)
    for tool in _SCRIPTS:
        found |= flags_of(tool)
    for verb in VERBS:
        found |= flags_of("xllm-compile", verb)
    for path in tree():
        if path.endswith(".py") and path.startswith(("bench/", "xllm_compiler/testing/")):
            found |= flags_of_script(path)
    return frozenset(found)


@functools.cache
def _make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@functools.cache
def _sources() -> str:
    """The text of every module of the package."""
    found = (path for path in tree() if path.endswith(".py") and not path.startswith(("tests/", "bench/", "docs/")))
    return "\n".join((ROOT / path).read_text(encoding="utf-8") for path in found)


def wrong_in_command(command: str) -> Iterator[str]:
    """Of one simple command: the program, its flags, its make targets."""
    command = command.split("  #")[0].strip()
    for target in re.findall(r"(?:^|[;&|] *)make ([a-z][\w-]*)", command):
        if target not in _make_targets():
            yield f"make {target}"
    for module in re.findall(r"python3? (?:-P )?-m (xllm_compiler[\w.]*)", command):
        if not exists(module.replace(".", "/") + ".py") and not exists(module.replace(".", "/")):
            yield f"python -m {module}"
    for part in re.split(r"[|;&]+", command):
        words = part.split()
        while words and (words[0] in ("not", "sudo", "//", "RUN:", ".") or "=" in words[0]):
            words = words[1:]
        if not words:
            continue
        program = words[0].removeprefix(".venv/bin/")
        given = {flag for word in words[1:] for flag in _flags(word.split("=")[0])}
        if re.fullmatch(r"xllm-[a-z-]+", program) and program not in _SCRIPTS and program != "xllm-compiler":
            yield program
        elif program in _SCRIPTS:
            verb = words[1] if program == "xllm-compile" and len(words) > 1 and words[1] in VERBS else ""
            yield from (
                f"{program} {verb} {flag}".replace("  ", " ") for flag in sorted(given - flags_of(program, verb))
            )
        elif program == "python" and len(words) > 1 and words[1].endswith(".py") and (ROOT / words[1]).exists():
            yield from (f"{words[1]} {flag}" for flag in sorted(given - flags_of_script(words[1])))
        elif program.startswith("--"):
            yield from sorted(_flags(program) - all_flags())


def wrong_in_code(code: str) -> Iterator[str]:
    """Of a piece of code: commands, paths, variables, imports."""
    yield from wrong_in_command(code)
    for word in (word.removesuffix(".") for word in re.split(r"[\s,:;()\"'=`]+", code)):
        if is_path(word) and not exists(word):
            yield word
    for name in re.findall(r"\bXLLM_[A-Z_]+\b", code):
        if name not in _sources() and name not in _variables():
            yield name
    for module, names in re.findall(r"from (xllm_compiler[\w.]*) import ([\w, ]+)", code):
        try:
            have = importlib.import_module(module)
        except ImportError:
            yield module
            continue
        yield from (f"{module}.{name}" for name in re.split(r",\s*", names.strip()) if not hasattr(have, name))


@functools.cache
def _variables() -> frozenset[str]:
    """The environment twins of the server's flags."""
    from xllm_compiler.runtime.server.settings import OPTIONS

    return frozenset(option.env for option in OPTIONS)


def _slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def wrong_in_link(target: str, page: Path) -> Iterator[str]:
    path, _, anchor = target.partition("#")
    if "://" in target:
        return
    place = (page.parent / path).resolve() if path else page
    if not place.exists():
        yield target
    elif anchor and place.suffix == ".md":
        headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
        if anchor not in map(_slug, headings):
            yield target


def wrong(text: str, page: Path) -> list[str]:
    """`page:line: name` of everything that the page names and that does not exist."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        names = [name for target in re.findall(r"\]\(([^)\s]+)\)", line) for name in wrong_in_link(target, page)]
        for code in [line] if line.startswith("    ") else re.findall(r"`([^`]+)`", line):
            names += wrong_in_code(code)
        found += [f"{page.relative_to(ROOT)}:{number}: {name}" for name in dict.fromkeys(names)]
    return found
