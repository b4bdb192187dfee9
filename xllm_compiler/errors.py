"""The one way in which this project fails. Owns the error type; must not know who raises it or how it is shown."""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "checkpoint",  # the Hugging Face directory or GGUF file is not what it says it is
    "unsupported",  # a sound model that this compiler cannot translate yet
    "ir",  # an IR text or module breaks a rule
    "option",  # a flag or a setting
    "artifact",  # a compiled directory is damaged, foreign or of another version
    "io",  # the file system or the network said no
    "request",  # a client's request
    "capacity",  # sound, but more than this server has
    "internal",  # a bug of ours
]


class XllmError(Exception):
    """What was wrong, where, and what to do about it.

    `message` names the values involved; `where` is a file, line, op or field; `help` is an instruction.
    """

    def __init__(self, kind: Kind, message: str, *, where: str = "", help: str = "") -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = message
        self.where = where
        self.help = help

    def __str__(self) -> str:
        lines = [f"error[{self.kind}]: {self.message}"]
        if self.where:
            lines.append(f"  at {self.where}")
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)

    @property
    def exit_code(self) -> int:
        """2 when the input is to blame, 1 when we are."""
        return 1 if self.kind == "internal" else 2
