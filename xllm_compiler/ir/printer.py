"""IR to text. Owns the `.xir` syntax on the writing side and the naming of values; must not check anything.

One generic form for all ops, so that an op that breaks a rule still prints:

    %y = nn.linear(%x, %w, bias=%b, act=silu) : bf16[N, 64]

Positional operands, optional operands by keyword, attributes that differ from their default, in declared order, then
`stream` and `at`. Names are hints made unique with _1, _2: printing what was parsed gives the same text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.loc import Loc
from xllm_compiler.ir.spec import COMMON, Attr, AttrField, format_float

_BAD_NAME = re.compile(r"[^A-Za-z0-9_.'$]+")
_SUFFIX = re.compile(r"_\d+$")


class Names:
    """Unique printable names for the values of one function, in the order in which they are asked for."""

    def __init__(self) -> None:
        self._names: dict[Value, str] = {}
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def of(self, value: Value) -> str:
        """`%name`, unique in this function."""
        name = self._names.get(value)
        if name is None:
            name = self._fresh(_BAD_NAME.sub("_", value.name) or "v")
            self._names[value] = name
            self._taken.add(name)
        return "%" + name

    def _fresh(self, hint: str) -> str:
        if hint not in self._taken:
            return hint
        base = _SUFFIX.sub("", hint) or hint
        count = self._next.get(base, 1)
        while f"{base}_{count}" in self._taken:
            count += 1
        self._next[base] = count + 1
        return f"{base}_{count}"


def func_names(func: Func) -> Names:
    """The names under which a whole function prints."""
    names = Names()
    for arg in func.args:
        names.of(arg)
    for op in func.ops:
        for r in op.results:
            names.of(r)
    return names


def print_module(module: Module, loc: bool = False) -> str:
    """The module as `.xir` text, ending in a newline. `loc`: with source lines and lineage."""
    lines = [f"xir 1 stage={module.stage}"]
    for s in module.scope.symbols.values():
        bounds = f"[{'*' if s.lo is None else s.lo}, {'*' if s.hi is None else s.hi}]"
        line = f"dim {s.name} in {bounds}" + (f" % {s.multiple}" if s.multiple != 1 else "")
        lines.append(_with_why(line, s.why))
    for a in module.scope.assumptions:
        lines.append(_with_why(f"assume {a.expr} >= 0", a.why))
    for name, group in module.groups.items():
        lines.append(f"group @{name} {group}")
    for func in module.funcs.values():
        lines += ["", *print_func(func, loc)]
    return "\n".join(lines) + "\n"


def _with_why(line: str, why: str) -> str:
    return f"{line}  // {' '.join(why.split())}" if why.strip() else line


def print_func(func: Func, loc: bool = False) -> list[str]:
    """The lines of one function."""
    names = Names()
    args = [f"{names.of(a)}: {a.type}" + (f" in {func.ranges[a]}" if a in func.ranges else "") for a in func.args]
    results: list[str] = []
    for i, v in enumerate(func.returns):
        alias = func.aliases.get(i)
        name = f"{func.outputs[i]}: " if i in func.outputs else ""
        results.append(f"{name}{v.type}" + ("" if alias is None else f" alias {names.of(alias)}"))
    arena = "" if func.arena is None else f" arena({func.arena})"
    lines = _signature(f"func @{func.name}", args, results, arena)
    for op in func.ops:
        lines.append("  " + print_op(op, names, loc))
    returned = ", ".join(names.of(v) for v in func.returns)
    lines += [f"  return {returned}".rstrip(), "}"]
    return lines


def _signature(head: str, args: Sequence[str], results: Sequence[str], arena: str) -> list[str]:
    tail = f" -> ({', '.join(results)}){arena} {{"
    one = f"{head}({', '.join(args)}){tail}"
    if len(one) <= 120:
        return [one]
    return [f"{head}(", *(f"    {a}," for a in args[:-1]), *(f"    {a}" for a in args[-1:]), f"){tail}"]


def print_op(op: Op, names: Names, loc: bool = False) -> str:
    """One op on one line, without indentation."""
    # Results are named before operands: an operand that is defined nowhere must not steal a name from a later line.
    results = ", ".join(names.of(r) for r in op.results)
    inside: list[str] = []
    for field in op.SPEC.operands:
        values = op.field(field.name)
        if field.arity == "opt":
            inside += [f"{field.name}={names.of(v)}" for v in values]
        else:
            inside += [names.of(v) for v in values]
    for attr in op.SPEC.attrs:
        if attr.kind != "type" and attr.name in op.attrs and not attr.is_default(op.attrs[attr.name]):
            inside.append(f"{attr.name}={attr_text(attr, op.attrs[attr.name])}")
    for name, attr in COMMON.items():
        if name in op.attrs:
            inside.append(f"{name}={attr_text(attr, op.attrs[name])}")
    text = f"{op.name}({', '.join(inside)})"
    if op.results:
        text = f"{results} = {text} : {', '.join(str(r.type) for r in op.results)}"
    return text + (f" {loc_text(op.loc)}" if loc and op.loc != Loc() else "")


def loc_text(loc: Loc) -> str:
    """`loc("modeling.py":12, "model.layers.0", "fuse-qkv/concat")`."""
    parts = [f"{quote(loc.file)}:{loc.line}", quote(loc.module_path), *(quote(x) for x in loc.lineage)]
    return f"loc({', '.join(parts)})"


def quote(text: str) -> str:
    """A string literal that the lexer reads back."""
    return json.dumps(text, ensure_ascii=False)


def attr_text(field: AttrField, value: Attr) -> str:
    """An attribute's value as its field's kind is written."""
    if isinstance(value, tuple):
        return "[" + ", ".join(_scalar_text(field, v) for v in value) + "]"
    return _scalar_text(field, value)


def _scalar_text(field: AttrField, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return format_float(value)
    if isinstance(value, (int, Dim)):
        return str(value)
    if field.kind == "group":
        return f"@{value}"
    if field.kind in ("enum", "dtype"):
        return str(value)
    return quote(str(value))


def window(op: Op, size: int = 5) -> list[str]:
    """`op` marked with `>` between up to `size` ops before and after it, named as the whole function prints them."""
    names = func_names(op.func)
    before: list[Op] = []
    after: list[Op] = []
    if op.attached:
        at = op.prev
        while at is not None and len(before) < size:
            before.append(at)
            at = at.prev
        at = op.next
        while at is not None and len(after) < size:
            after.append(at)
            at = at.next
    return [
        *_marked(reversed(before), names, "  "),
        *_marked([op], names, "> "),
        *_marked(after, names, "  "),
    ]


def _marked(ops: Iterable[Op], names: Names, mark: str) -> list[str]:
    return [mark + print_op(op, names) for op in ops]
