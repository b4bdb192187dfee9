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
