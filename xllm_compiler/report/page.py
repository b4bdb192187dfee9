"""The HTML page: one file, no other resource. Owns putting data, style and script together; what is shown is data.py's.

Nothing of a module's text reaches the page but inside one JSON value, from which the script makes text nodes only; the
page's own policy admits no script or style but the two that it names by digest, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from xllm_compiler.analysis.machine import Machine
from xllm_compiler.ir.core import Module
from xllm_compiler.passes.instruments import History
from xllm_compiler.passes.manager import PipelineReport
from xllm_compiler.report.data import report_data
from xllm_compiler.report.timeline import write_text
from xllm_compiler.report.tries import Tries

SCRIPTS = ("blocks.js", "ops.js", "layers.js", "costs.js", "passes.js", "pictures.js", "start.js")
"""Parts of the script, in the order in which they are put together."""


class ReportPage(History):
    """Writes the report of a pipeline run to `path` when it has finished.

    Put `tries` into the context's listeners to see which rules were tried and where they gave up.
    """

    def __init__(
        self,
        path: Path,
        title: str,
        machine: Machine,
        dims: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(loc=True)
        self.path, self.title, self.machine, self.dims = path, title, machine, dims
        self.tries = Tries()

    def finished(self, report: PipelineReport, module: Module) -> None:
        write_report(self.path, module, self, report, self.title, self.machine, self.dims, self.tries)


def write_report(
    path: Path,
    module: Module,
    history: History,
    report: PipelineReport,
    title: str,
    machine: Machine,
    dims: Mapping[str, int] | None = None,
    tries: Tries | None = None,
) -> None:
    """Writes the page about a pipeline run that has left `module`. `history` should have locs, so that changes can be
    told apart by layer; `dims` are sizes to show beside the usual ones. Equal input gives equal bytes."""
    write_text(path, page(report_data(module, history, report, title, machine, dims, tries)))


def page(data: dict[str, Any]) -> str:
    """The whole page about `data`."""
    style, script = _part("report.css"), _script()
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}"
    blob = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # In a script element only these could end it or open a comment; JSON reads them back from escapes.
    for char in "<>&\u2028\u2029":
        blob = blob.replace(char, f"\\u{ord(char):04x}")
    parts = {
        "title": html.escape(data["title"]),
        "policy": html.escape(policy),
        "style": style,
        "script": script,
        "data": blob,
    }
    head, *rest = _part("template.html").split("{{")
    out = [head]
    for piece in rest:  # one pass: what is put in is not looked at again
        name, _, tail = piece.partition("}}")
        out += [parts[name], tail]
    return "".join(out)


def _part(name: str) -> str:
    return files("xllm_compiler.report").joinpath("assets", name).read_text(encoding="utf-8")


def _script() -> str:
    """The script's parts, in one scope. The page is shown when all of it is drawn, or when drawing failed.

    A slow browser would else paint it empty first, and move what is being read.
    """
    parts = "\n".join(_part(name) for name in SCRIPTS)
    shown = 'delete document.querySelector("main").dataset.drawing;'
    return f'"use strict";\ntry {{\n{parts}}} finally {{\n{shown}\n}}\n'


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
