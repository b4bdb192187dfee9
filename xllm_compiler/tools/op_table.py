"""The table of ops in docs/ops.md, made from the op classes. Owns its text; must not know any op.

python -m xllm_compiler.tools.op_table docs/ops.md            # writes it
python -m xllm_compiler.tools.op_table docs/ops.md --check    # fails where it is not what would be written
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from xllm_compiler.errors import XllmError
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Op
from xllm_compiler.ir.facts import Noise, Word, Work
from xllm_compiler.ir.opdef import OPS
from xllm_compiler.ir.spec import AttrField, format_float
from xllm_compiler.tools.console import run

COMMAND: Final = "python -m xllm_compiler.tools.op_table"
FAMILIES: Final[dict[str, str]] = {
    "param": "Leaves",
    "elementwise": "Elementwise, several operands",
    "unary": "Elementwise, one operand",
    "tensor": "Tensors",
    "nn": "Neural networks",
    "quant": "Quantized weights",
    "kv": "KV cache",
    "state": "Cells",
    "comm": "Collectives",
    "sched": "Streams",
}
"""Titles of the families that have an order of their own; others follow under their module's name."""


def op_table() -> str:
    """All of docs/ops.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield from (
        "# Ops",
        "",
        f"Written by `{COMMAND} docs/ops.md` from the classes in `xllm_compiler/ir/ops/`; do not edit.",
        "An op class says what stands here and more: [ir.md](ir.md#an-op-class) and `ir/facts.py`.",
        "",
        "In the first column operands come first; `b=` is an optional operand, `eps: float` an attribute that must be",
        "given, `offset=0.0` one that need not. Floats are computed in f32 and rounded once, at the results.",
        "",
        "**rows**: what an op does to rows, such as the values of one token (`ir/rows.py`).",
        "",
    )
    yield from _words("noise", Noise)
    yield from _words("work", Work)
    families: dict[str, list[type[Op]]] = {name: [] for name in FAMILIES}
    for cls in OPS.values():
        if cls.__module__.startswith(f"{ops.__name__}."):
            families.setdefault(cls.__module__.rpartition(".")[2], []).append(cls)
    for family, classes in families.items():
        yield from (f"## {FAMILIES.get(family, family)}", "")
        for paragraph in _paragraphs(sys.modules[f"{ops.__name__}.{family}"])[1:]:
            yield from (paragraph, "")
        yield from ("| op | meaning | rows | noise | work | also |", "|---|---|---|---|---|---|")
        yield from map(_row, classes)
        yield ""


def _words(fact: str, kind: type[Word]) -> Iterator[str]:
    """What the values of a fact mean, as a list."""
    yield from (f"**{fact}**: {inspect.getdoc(kind)}", "")
    yield from (f"- {word.word}: {word.meaning}" for word in kind)
    yield ""


def _row(cls: type[Op]) -> str:
    spec = cls.SPEC
    also = [f"effect: {effect}" for effect in sorted(spec.effects)]
    also += [f"uses up {spec.consumes}"] if spec.consumes else []
    also += [f"gathers from {spec.gathers}"] if spec.gathers else []
    also += [word for word in ("linear", "view", "commutative") if getattr(spec, word)]
    meaning = " ".join(_paragraphs(cls))
    cells = (f"`{_signature(cls)}`", meaning, str(cls.rows), cls.noise.word, cls.work.word, ", ".join(also))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _signature(cls: type[Op]) -> str:
    spec = cls.SPEC
    marks = {"one": "", "opt": "=", "many": ".."}
    fields = [f.name + marks[f.arity] for f in spec.operands] + [_attribute(a) for a in spec.attrs]
    return f"{spec.name}({', '.join(fields)})"


def _attribute(attr: AttrField) -> str:
    kind = "/".join(attr.choices) or attr.kind
    if attr.required:
        return f"{attr.name}: {kind}" + ("[]" if attr.many else "")
    default = attr.default
    text = format_float(default) if isinstance(default, float) else str(default)
    return f"{attr.name}={text.lower() if isinstance(default, bool) else text or 'none'}"


def _paragraphs(documented: object) -> list[str]:
    """The paragraphs of a docstring, each on one line."""
    return [" ".join(part.split()) for part in (inspect.getdoc(documented) or "").split("\n\n")]


def main(argv: Sequence[str]) -> int:
    """Run the tool and return its exit code: 0, or 2 where `--check` finds the file outdated."""
    return run(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write the table of ops.")
    parser.add_argument("path", type=Path, help="the file, docs/ops.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file is outdated")
    given = parser.parse_args(argv)
    text = op_table()
    if not given.check:
        given.path.write_text(text, encoding="utf-8")
    elif not given.path.is_file() or given.path.read_text(encoding="utf-8") != text:
        raise XllmError("option", f"{given.path} is not what the op classes say", help=f"run {COMMAND} {given.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
