"""A digest of what a module means. Owns structural hashing; must not depend on value names, locations or comments."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from xllm_compiler.ir.core import Func, Module, Value
from xllm_compiler.ir.printer import attr_text


def structural_hash(module: Module) -> str:
    """64 hex digits, equal for modules that differ only in SSA names, locations and reasons.

    Names of arguments and outputs count: they are the interface. So does op order, which is the schedule.
    """
    digest = hashlib.sha256()

    def put(*parts: str) -> None:
        for part in parts:
            raw = part.encode()
            digest.update(len(raw).to_bytes(4, "little"))
            digest.update(raw)

    put("xir 1", module.stage)
    for s in module.scope.symbols.values():
        put("dim", s.name, str(s.lo), str(s.hi), str(s.multiple))
    for a in module.scope.assumptions:
        put("assume", str(a.expr))
    for name, group in module.groups.items():
        put("group", name, str(group))
    for func in module.funcs.values():
        for line in _func_lines(func):
            put(*line)
    return digest.hexdigest()


_type_text = lru_cache(maxsize=4096)(str)
"""Of a type: the same few stand on every op of a model."""


def _func_lines(func: Func) -> list[list[str]]:
    number: dict[Value, str] = {}
    lines = [["func", func.name, str(func.arena)]]
    for i, arg in enumerate(func.args):
        number[arg] = f"a{i}"
        lines.append(["arg", arg.name, _type_text(arg.type), str(func.ranges.get(arg, ""))])

    # A value that is defined nowhere before its use is broken IR (verify says so), which must still hash.
    def ref(v: Value) -> str:
        return number.get(v, "undefined")

    for i, op in enumerate(func.ops):
        line = [op.name, ",".join(map(str, op.segments)), *(ref(v) for v in op.operands)]
        for name, value in sorted(op.attrs.items()):
            field = op.SPEC.attr(name)
            line += [name, str(value) if field is None or field.kind == "type" else attr_text(field, value)]
        for r in op.results:
            number[r] = f"{i}.{r.index}"
            line.append(_type_text(r.type))
        lines.append(line)
    lines.append(["return", *(ref(v) for v in func.returns)])
    lines.append(["outputs", *(f"{i}:{name}" for i, name in func.outputs.items())])
    lines.append(["alias", *(f"{i}:{ref(v)}" for i, v in func.aliases.items())])
    return lines
