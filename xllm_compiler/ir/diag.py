"""How an IR rule violation is told. Owns IrError and the rendering of op windows; must not decide what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xllm_compiler.errors import XllmError

if TYPE_CHECKING:
    from xllm_compiler.ir.core import Op


class IrError(XllmError):
    """An XllmError of kind "ir". `op` is the offender when there is one (it may never have been inserted)."""

    def __init__(self, message: str, *, where: str = "", help: str = "", op: Op | None = None) -> None:
        super().__init__("ir", message, where=where, help=help)
        self.op = op


def blame(op: Op, message: str, help: str = "", window: int = 5) -> IrError:
    """An IrError about `op` whose `where` shows it among its neighbours, its model source line and its lineage."""
    return IrError(message, where=render(op, window), help=help, op=op)


def render(op: Op, window: int = 5) -> str:
    """`op` marked with `>` between up to `window` ops on each side; where it was traced from; what touched it last."""
    from xllm_compiler.ir.printer import window as op_window  # the printer needs core, which needs IrError

    lines = [f"@{op.func.name}"]
    lines += ["    " + line for line in op_window(op, window)]
    traced = op.loc.describe()
    if traced:
        lines.append(f"  traced from {traced}")
    if op.loc.lineage:
        lines.append(f"  touched by {', '.join(op.loc.lineage)}")
    return "\n".join(lines)
