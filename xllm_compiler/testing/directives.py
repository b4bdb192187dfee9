"""What a file test says in its comments. Owns the grammar of directives and its strictness; must not run anything.

    // RUN: xllm-opt %s -p fuse-add-norm | filecheck %s
    // EQUIV: N=1,2,7 B=1
    // UNCHANGED
    // BLESS
    // CHECK: ..                     and -NEXT -SAME -NOT -DAG -EMPTY -LABEL -COUNT-n, read by the filecheck package
    %y = t.neg(%x) : f32[N]          // ERROR: text          (also REMARK: text; or alone on a line before)

A comment that is nearly a directive, and a file that expects nothing, are errors: a test that silently checks less than
its author meant is worse than none.
"""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass, field
from typing import Final, Literal, NoReturn

from xllm_compiler.dims import DimScope
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.lexer import Source
from xllm_compiler.testing.comments import WORD, Comment, base, comments, meant
from xllm_compiler.tools.arguments import size_combinations

TOOLS: Final = ("xllm-opt", "xllm-run")
SUFFIXES: Final = ("NEXT", "SAME", "NOT", "DAG", "EMPTY", "LABEL", "COUNT")
FILECHECK_FLAGS: Final = ("--match-full-lines", "--strict-whitespace")
WITH_TEXT: Final = ("RUN", "EQUIV", "ERROR", "REMARK")
ALONE: Final = ("UNCHANGED", "BLESS")
CUT: Final = re.compile(r"// -{5,}[ \t]*")  # a line between the modules of a file that is run with --split-file
_PREFIX: Final = re.compile(r"--check-prefix(?:es)?=([A-Za-z0-9_,-]+)")
_SIZE: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=([0-9]+(?:,[0-9]+)*)")
Kind = Literal["error", "remark"]


@dataclass(frozen=True, slots=True)
class Check:
    """The `| filecheck` end of a RUN line."""

    prefixes: tuple[str, ...] = ("CHECK",)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One RUN line. `args` still hold %s and %S; `fails`: begins with `not`; `both`: checks standard error too."""

    line: int
    text: str
    tool: str
    args: tuple[str, ...]
    check: Check | None = None
    fails: bool = False
    both: bool = False

    @property
    def has_pipeline(self) -> bool:
        """Whether there is something that could change a module."""
        return self.tool == "xllm-opt" and any(a.startswith(("-p", "--pipeline")) for a in self.args)

    def argv(self, file: str, folder: str) -> list[str]:
        """The tool's arguments for a test at `file` in `folder`."""
        return [a.replace("%s", file).replace("%S", folder) for a in self.args]


@dataclass(frozen=True, slots=True)
class Expected:
    """An ERROR or REMARK: `line` is the directive's, `at` the line to be blamed (0: any, or none at all)."""

    kind: Kind
    text: str
    line: int
    at: int

    def fits(self, text: str) -> bool:
        """Whether `text` has ours in it; `{{..}}` in ours is a regular expression."""
        parts = re.split(r"\{\{(.*?)\}\}", self.text)
        pattern = "".join(p if i % 2 else r"\s+".join(map(re.escape, re.split(r"\s+", p))) for i, p in enumerate(parts))
        return re.search(pattern, text) is not None


@dataclass(frozen=True, slots=True)
class Equiv:
    """An EQUIV line: symbols and the values to try, every combination that the module's assumptions allow."""

    line: int
    values: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Directives:
    """Everything a file says. Numbers are lines, counted from 1; 0 is absent."""

    source: Source
    runs: tuple[Run, ...] = ()
    checks: tuple[tuple[int, str], ...] = ()  # (line, prefix)
    equiv: Equiv | None = None
    unchanged: int = 0
    bless: int = 0
    expected: tuple[Expected, ...] = ()

    def masked(self) -> str:
        """The text with ERROR and REMARK comments blanked, every character in its place: `//` may stand where the
        IR reads a floor division, and the comment of a `dim` line is part of the IR."""
        return mask(self.source.text)

    def sizes(self, scope: DimScope) -> list[dict[str, int]]:
        """The combinations of EQUIV that `scope` allows; an error when a symbol or value does not fit it."""
        assert self.equiv is not None
        try:
            return size_combinations(scope, dict(self.equiv.values), "EQUIV")
        except XllmError as e:
            _fail(self.source, self.equiv.line, e.message.removeprefix("EQUIV: "), e.help)


def mask(text: str) -> str:
    """`text` with the comments that are ERROR and REMARK directives turned into spaces."""
    out = text
    for c in comments(text):
        if re.match(r"(ERROR|REMARK):", c.body):
            stop = text.find("\n", c.start)
            stop = len(text) if stop < 0 else stop
            out = out[: c.start] + " " * (stop - c.start) + out[stop:]
    return out


def holds_directives(text: str) -> bool:
    """Whether a file is meant as a test: some comment is a directive, or nearly one of ours."""
    known = _known(("CHECK",))
    return any((m := WORD.match(c.body)) is not None and meant(m, c.body, known) for c in comments(text))


def _known(prefixes: tuple[str, ...]) -> list[str]:
    checks = [p + s for p in prefixes for s in ("", *(f"-{s}" for s in SUFFIXES))]
    return [*WITH_TEXT, *ALONE, *checks]


# ------------------------------------------------------------------------------------------------------------- reading


def parse_directives(text: str, filename: str) -> Directives:
    """Everything that `text` expects. An IrError shows the line of what is misspelt, misplaced or without effect."""
    return _Reader(Source(text, filename)).read()


def expectations(text: str, filename: str, split: bool = False) -> tuple[Expected, ...]:
    """Only the ERROR and REMARK directives; RUN lines may be missing. `split`: the file holds several modules."""
    reader = _Reader(Source(text, filename), split)
    reader.scan()
    return tuple(reader.expected)


def _fail(source: Source, line: int, message: str, help: str = "", at: str = "") -> NoReturn:
    """An error about a line, with carets under `at` or all of it."""
    lines = source.text.split("\n")
    row = lines[line - 1].rstrip("\r") if line else ""
    begin = sum(len(text) + 1 for text in lines[: line - 1]) if line else 0
    column = row.find(at) if at else -1
    if column < 0:
        column, at = len(row) - len(row.lstrip()), row.strip()
    raise source.error(message, begin + column, begin + column + max(len(at), 1), help)


@dataclass
class _Reader:
    source: Source
    split: bool = False
    runs: list[Run] = field(default_factory=list)
    checks: list[tuple[int, str]] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)
    equiv: Equiv | None = None
    alone: dict[str, int] = field(default_factory=dict)

    def fail(self, line: int, message: str, help: str = "", at: str = "") -> NoReturn:
        _fail(self.source, line, message, help, at)

    def read(self) -> Directives:
        self.scan()
        self.check_all()
        return Directives(
            self.source,
            tuple(self.runs),
            tuple(self.checks),
            self.equiv,
            self.alone.get("UNCHANGED", 0),
            self.alone.get("BLESS", 0),
            tuple(self.expected),
        )

    def scan(self) -> None:
        found = list(comments(self.source.text))
        prefixes = ["CHECK"]
        for c in found:  # RUN lines first: they name the prefixes
            if c.body.startswith("RUN:"):
                self.runs.append(self.run(c))
                run = self.runs[-1]
                prefixes += [p for p in (run.check.prefixes if run.check else ()) if p not in prefixes]
        known = _known(tuple(prefixes))
        seen = re.compile(
            rf"(?:^|[^a-zA-Z_-])((?:{'|'.join(map(re.escape, prefixes))})(?:-[A-Z0-9-]+)?(?:\{{LITERAL\}})?:)"
        )
        lines = self.source.text.split("\n")
        code = self.code_lines(found, lines)
        for c in found:
            word = self.word(c, known)
            if word and word not in ("ERROR", "REMARK") and not c.alone:
                self.fail(c.line, f"{word} stands behind code", "put it on a line of its own", word)
            match word:
                case "ERROR" | "REMARK":
                    self.expect(c, word, code)
                case "EQUIV":
                    self.sizes(c)
                case "UNCHANGED" | "BLESS":
                    if word in self.alone:
                        self.fail(c.line, f"{word} is said twice", "", word)
                    self.alone[word] = c.line
                case "RUN" | "":
                    pass
                case _:
                    prefix = max((p for p in prefixes if word == p or word.startswith(f"{p}-")), key=len)
                    self.checks.append((c.line, prefix))

        ours = {line for line, _ in self.checks} | {run.line for run in self.runs}
        for number, line in enumerate(lines, 1):
            if number not in ours and (hit := seen.search(line)):
                self.fail(number, f"filecheck would read {hit[1]} in this line", "reword it", hit[1])

    def code_lines(self, found: list[Comment], lines: list[str]) -> list[int]:
        """Numbers of the lines that hold more than a comment."""
        only = {c.line for c in found if c.alone}
        return [i for i, line in enumerate(lines, 1) if line.strip() and i not in only]

    def firsts(self, code: list[int]) -> list[int]:
        """The first line of code in the file, and behind every cut of a file that is split."""
        split = self.split or any("--split-file" in run.args for run in self.runs)
        lines = self.source.text.split("\n") if split else []
        cuts = [i for i, text in enumerate(lines, 1) if CUT.fullmatch(text.rstrip("\r"))]
        return [next((n for n in code if n > cut), 0) for cut in (0, *cuts)]

    def word(self, c: Comment, known: list[str]) -> str:
        """The directive of a comment, "" for prose; an error for what lies between."""
        m = WORD.match(c.body)
        if m is None:
            return ""
        word, name = m["word"], meant(m, c.body, known)
        right = f"{name}-n" if name.endswith("-COUNT") else name
        right += "" if name in ALONE else ":"
        if not name:
            if m["colon"] and word == word.upper() and len(word) > 1:
                near = difflib.get_close_matches(word.replace("_", "-"), known, n=1, cutoff=0.5)
                help = f"did you mean {near[0]}" if near else "directives are " + ", ".join(known[:7])
                self.fail(c.line, f"there is no directive {word}:", f"{help}; for prose, do without the colon", word)
            return ""
        if base(word) != name or (name.endswith("-COUNT") and word == name):
            self.fail(c.line, f"{word} is no directive", f"did you mean {right}", word)
        if name in ALONE:
            if c.body != word:
                self.fail(c.line, f"{word} stands alone", f"write `// {word}`, and prose on another line", c.body)
        elif m["colon"] != ":":
            self.fail(c.line, f"{word} without its colon expects nothing", f"write {right}", word)
        elif m["literal"] and name in WITH_TEXT:
            self.fail(c.line, "{LITERAL} is for CHECK lines", "", "{LITERAL}")
        elif not c.body[m.end() :].strip() and not name.endswith("-EMPTY"):
            self.fail(c.line, f"{word}: says nothing", "", word)
        return name

    def expect(self, c: Comment, word: str, code: list[int]) -> None:
        text = c.body.split(":", 1)[1].strip()
        at = c.line
        if c.alone:
            at = next((n for n in code if n > c.line), 0)
            if not at:
                self.fail(c.line, f"no line follows that this {word} could be about", "", word)
            if at in self.firsts(code):  # before everything
                at = 0
        try:
            fit = Expected("error" if word == "ERROR" else "remark", text, c.line, at)
            fit.fits("")
        except re.error as e:
            self.fail(c.line, f"not a regular expression: {e}", "", text)
        self.expected.append(fit)

    def sizes(self, c: Comment) -> None:
        if self.equiv is not None:
            self.fail(c.line, "EQUIV is said twice", "one line names all symbols: EQUIV: N=1,7 B=1,2", "EQUIV")
        values: dict[str, tuple[int, ...]] = {}
        for part in c.body.split(":", 1)[1].split():
            m = _SIZE.fullmatch(part)
            if m is None or m[1] in values:
                self.fail(c.line, f"cannot read {part!r}", "EQUIV names each symbol once: EQUIV: N=1,2,7 B=1,2", part)
            values[m[1]] = tuple(int(v) for v in m[2].split(","))
        self.equiv = Equiv(c.line, tuple(values.items()))

    def run(self, c: Comment) -> Run:
        text = c.body.removeprefix("RUN:").strip()
        command, bar, end = text.partition("|")
        try:
            words, after = shlex.split(command), shlex.split(end)
        except ValueError as e:
            self.fail(c.line, f"cannot read the command: {e}", "", text)
        both = words[-1:] == ["2>&1"]
        words = words[:-1] if both else words
        fails = words[:1] == ["not"]
        words = words[1:] if fails else words
        tool = words[0] if words else ""
        if tool not in TOOLS:
            near = difflib.get_close_matches(tool, TOOLS, n=1)
            help = f"did you mean {near[0]}" if near else "RUN: xllm-opt %s -p PIPELINE | filecheck %s"
            self.fail(c.line, f"RUN starts xllm-opt or xllm-run, not {tool!r}", help, tool)
        if "%s" not in words:
            self.fail(c.line, "RUN does not read this file", "give %s to the tool, which stands for its path", text)
        if both and not bar:
            self.fail(c.line, "2>&1 without | filecheck has no effect", "", "2>&1")
        return Run(c.line, text, tool, tuple(words[1:]), self.filecheck(c, after) if bar else None, fails, both)

    def filecheck(self, c: Comment, words: list[str]) -> Check:
        if words[:1] != ["filecheck"] or "%s" not in words:
            self.fail(c.line, "after | comes `filecheck %s` and nothing else", "", "|")
        prefixes: list[str] = []
        flags: list[str] = []
        for w in words[1:]:
            m = _PREFIX.fullmatch(w)
            if m is not None:
                prefixes += m[1].split(",")
            elif w in FILECHECK_FLAGS:
                flags.append(w)
            elif w != "%s":
                known = ["--check-prefix=P", *FILECHECK_FLAGS]
                near = difflib.get_close_matches(w, known, n=1)
                help = f"did you mean {near[0]}" if near else "filecheck takes " + ", ".join(known)
                self.fail(c.line, f"filecheck has no {w}", help, w)
        for p in prefixes:
            if not re.fullmatch(r"[A-Z][A-Z0-9]*(?:-[A-Z0-9]+)*", p) or p in (*WITH_TEXT, *ALONE, "COM"):
                self.fail(c.line, f"{p} cannot be a prefix", "a prefix is in capitals and no directive", p)
        return Check(tuple(prefixes) or ("CHECK",), tuple(flags))

    def check_all(self) -> None:
        """What must agree between lines."""
        used = {p for _, p in self.checks}
        named = [p for r in self.runs for p in (r.check.prefixes if r.check else ())]
        for line, prefix in self.checks:
            if prefix not in named:
                self.fail(line, f"no RUN line hands its output to filecheck for {prefix} lines", "add `| filecheck %s`")
        unchanged, bless = self.alone.get("UNCHANGED", 0), self.alone.get("BLESS", 0)
        first = next((line for line in (unchanged, bless) if line), 0)
        first = first or (self.equiv.line if self.equiv else self.expected[0].line if self.expected else 0)
        if not self.runs:
            self.fail(first, "this file has no RUN line", "such as RUN: xllm-opt %s -p dce | filecheck %s")
        for run in self.runs:
            for p in run.check.prefixes if run.check else ():
                if p not in used and not bless:
                    self.fail(run.line, f"no line begins with {p}:", "write what to expect, or // BLESS", run.text)
        if bless and len([r for r in self.runs if r.check]) != 1:
            self.fail(bless, "BLESS needs exactly one RUN line with filecheck", "whose output would it take?")
        errors = [e for e in self.expected if e.kind == "error"]
        meaning = unchanged or (self.equiv.line if self.equiv else 0)
        if errors and meaning:
            self.fail(meaning, "a RUN that fails leaves nothing to compare", "ERROR stands without EQUIV and UNCHANGED")
        if meaning and not any(run.has_pipeline for run in self.runs):
            self.fail(meaning, "no RUN line has a pipeline that could change anything", "xllm-opt %s -p PASSES")
        for run in self.runs:
            if run.check is None and not ((meaning and run.has_pipeline) or self.expected):
                self.fail(
                    run.line, "this RUN line expects nothing", "CHECK, EQUIV, UNCHANGED, ERROR or REMARK say what"
                )
            if run.fails and meaning:
                self.fail(run.line, "`not` says that this fails; then nothing can be compared", "", "not")
            if errors and run.check is not None and not run.both:
                self.fail(run.line, "a RUN that fails prints nothing to check", "2>&1 | filecheck %s reads errors", "|")
