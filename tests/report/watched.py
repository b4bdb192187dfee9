"""Running a pipeline with everything watching that a report wants."""

from __future__ import annotations

from dataclasses import dataclass

from model_text import PIPELINE

from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.instruments import History
from xllm_compiler.passes.manager import PipelineReport, run_pipeline
from xllm_compiler.report.tries import Tries


@dataclass
class Ran:
    """A module after a pipeline, and what watched it."""

    module: Module
    history: History
    report: PipelineReport
    tries: Tries


def run_watched(text: str, pipeline: str = PIPELINE) -> Ran:
    module = parse_module(text, "model.xir")
    history, tries = History(loc=True), Tries()
    report = run_pipeline(pipeline, module, PassContext(listeners=[tries]), instruments=[history])
    return Ran(module, history, report, tries)
