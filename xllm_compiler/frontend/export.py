"""Runs torch.export over a model: one flat run of tokens in, logits and hidden states out.

Owns what is asked of the model's forward pass, and errors that name the model's own line.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.attention import AttendCall, recording
from xllm_compiler.frontend.importer import short_path
from xllm_compiler.frontend.model import takes
from xllm_compiler.step.interface import HIDDEN, LOGITS

# The range that export may assume: so wide that a model which branches on the number of tokens is found out.
EXPORT_MAX = 1 << 24


class _Sizes:
    """What a trace found out about sizes, for error messages. No attribute of a module: export would put those back."""

    env: ShapeEnv | None = None


class _Step(torch.nn.Module):
    """The model over one flat run of tokens: ids [N], pos [N], sel [S] to an f32 tensor [S, width] for each of
    `outputs`: logits, and hidden states behind the final norm."""

    def __init__(self, model: torch.nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs
        self.keeps = takes(model, "logits_to_keep")
        self.positioned = takes(model, "position_ids")
        self.sizes = _Sizes()

    def forward(self, ids: torch.Tensor, pos: torch.Tensor, sel: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = ids.shape[0]
        if isinstance(tokens, torch.SymInt):
            self.sizes.env = tokens.node.shape_env
        arguments: dict[str, Any] = {"input_ids": ids[None], "use_cache": False, "return_dict": True}
        if self.positioned:
            arguments["position_ids"] = pos[None]
        if self.keeps:
            arguments["logits_to_keep"] = sel
        with _base_results(self.model) as inner:
            result = self.model(**arguments)
        out = []
        for name in self.outputs:
            if name == HIDDEN:
                out.append(_last_hidden(self.model, inner if LOGITS in self.outputs else [result])[0].float()[sel])
            else:
                logits = result.logits[0].float()
                out.append(logits if self.keeps else logits[sel])
        return tuple(out)


@contextmanager
def _base_results(model: Any) -> Iterator[list[Any]]:
    """What the models inside this one return, as they return it: heads do not pass on the last hidden state."""
    seen: list[Any] = []
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    hooks = [module.register_forward_hook(lambda module, given, result: seen.append(result)) for module in inner]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _last_hidden(model: Any, results: list[Any]) -> torch.Tensor:
    """The last one is the outermost's: [1, N, width]."""
    hidden = getattr(results[-1], "last_hidden_state", None) if results else None
    if not isinstance(hidden, torch.Tensor):
        raise XllmError("unsupported", f"{type(model.base_model).__name__} returns no last hidden state")
    return hidden


def export_model(model: Any, outputs: tuple[str, ...]) -> tuple[ExportedProgram, list[AttendCall]]:
    """Runs torch.export. Whatever goes wrong in the model's own code is an XllmError naming its line."""
    tokens = ExportDim("N", min=2, max=EXPORT_MAX)
    sampled = ExportDim("S", min=2, max=EXPORT_MAX)
    inputs = (
        torch.zeros(11, dtype=torch.int32),
        torch.arange(11, dtype=torch.int32),
        torch.arange(3, dtype=torch.int32),
    )
    step = _Step(model, outputs)
    with recording() as calls, torch.no_grad():
        try:
            program = torch.export.export(
                step, inputs, dynamic_shapes=({0: tokens}, {0: tokens}, {0: sampled}), strict=False
            )
        except XllmError:
            raise
        except Exception as e:
            raise _model_error(e, _guarded_line(step)) from e
    if not calls:
        raise XllmError(
            "unsupported",
            f"{type(model).__name__} calls no attention that can be replaced",
            help="it has an attention of its own, or none",
        )
    return program, calls


_MODEL_FRAME = re.compile(r'transformers/models/(\S+?)", line (\d+)')


def _guarded_line(step: _Step) -> str:
    """The model's line that made the trace depend on the number of tokens, "" where there is none."""
    for guard in [] if step.sizes.env is None else step.sizes.env.guards:
        found = re.search(r"(transformers/models/\S+\.py:\d+)", str(guard.sloc))
        if found:
            return found.group(1)
    return ""


def _model_error(e: Exception, guarded: str) -> XllmError:
    """An exception from inside a trace, at the innermost line of the model."""
    where = ""
    seen: BaseException | None = e
    while seen is not None and not where:
        for frame in reversed(traceback.extract_tb(seen.__traceback__)):
            if "/transformers/models/" in frame.filename:
                where = f"{short_path(frame.filename)}:{frame.lineno}"
                break
        seen = seen.__cause__ or seen.__context__
    text = " ".join(str(e).split())
    found = _MODEL_FRAME.findall(text) if not where else []
    if found:
        where = f"transformers/models/{found[-1][0]}:{found[-1][1]}"
    if "Mask'" in text:
        message = "the model computes with its attention mask, outside of the attention function"
    elif "Constraints violated" in text or "ConstraintViolation" in text:
        rule = re.search(r"generated guard (.+?)\.?(?: - Not| Suggested| The error|$)", text)
        condition = f", which has to satisfy {rule.group(1)}" if rule else ""
        message = "the model decides by the number of tokens" + condition.replace("L['ids'].size()[0]", "N")
        where = where or guarded
    elif "data-dependent" in text or "DataDependent" in type(e).__name__:
        message = "the model decides by the values of its tensors"
    else:
        message = f"the model cannot be traced ({type(e).__name__}: {text[:240]})"
    return XllmError("unsupported", message, where=where)
