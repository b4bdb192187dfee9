"""From a checkpoint to its functions: build the model, trace it, import the graph, prove that it may be batched.

Owns `trace_checkpoint` and the shapes of `@step` and `@embed` (see docs/ir.md). It translates; passes improve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from xllm_compiler.dims import sym
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend import aten  # noqa: F401  (registers the handlers)
from xllm_compiler.frontend.attention import AttendCall, decide
from xllm_compiler.frontend.checkpoint import Array, Checkpoint
from xllm_compiler.frontend.embedding import pooling_of
from xllm_compiler.frontend.export import EXPORT_MAX, export_model
from xllm_compiler.frontend.importer import DTYPES, Importer, Item
from xllm_compiler.frontend.model import (
    TORCH_DTYPE,
    CheckpointInfo,
    build_model,
    load_config,
    model_facts,
    model_lengths,
    text_config,
)
from xllm_compiler.frontend.quantized import Quantized
from xllm_compiler.frontend.quantized_weight import StoredWeight
from xllm_compiler.frontend.rows import check_rows
from xllm_compiler.frontend.stored import check_weights, checkpoint_names, judge_leftovers, tied_names, untie
from xllm_compiler.frontend.weights import Slot, WeightSource, match
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Builder, Func, Module, Value
from xllm_compiler.ir.types import Kv, Tensor
from xllm_compiler.step.inputs import step_inputs
from xllm_compiler.step.interface import EMBED, HIDDEN, LOGITS, STEP, Pooling

PAGE_TOKENS = 16  # in a KV page, what is handed out to a request at once: any multiple of a target's tile
MAX_PAGES = 1 << 24
_MAX_MODEL_LEN = 1 << 24
_OUTPUTS = {STEP: LOGITS, EMBED: HIDDEN}


@dataclass(frozen=True)
class Traced:
    """A traced model: `module` is in stage graph with the functions that were asked for; `weights` has a tensor for
    every param op."""

    module: Module
    info: CheckpointInfo
    weights: WeightSource
    notes: tuple[str, ...] = ()  # what the user should know


def trace_checkpoint(
    source: Checkpoint | Any,
    *,
    dtype: str,
    max_model_len: int | None = None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_num_logits: int,
    functions: tuple[str, ...] = (STEP,),
    check_finite: bool = True,
) -> Traced:
    """Traces an opened checkpoint, or a transformers config (whose weights then have no values).

    `functions`: which of @step and @embed; both come from one trace. Without @step the model needs no head.
    `dtype` is "f32" or "bf16". `max_model_len` is in tokens; None takes what the model was made for. Raises XllmError
    with kind "checkpoint" (the directory), "unsupported" (the model) or "option" (a limit).
    """
    if dtype not in TORCH_DTYPE:
        raise XllmError("option", f"dtype {dtype!r} cannot be compiled", help="one of " + ", ".join(TORCH_DTYPE))
    checkpoint: Checkpoint | None = None
    quantized: Quantized | None = None
    if isinstance(source, Checkpoint):
        quantized = Quantized.of(source)
        checkpoint = quantized.view
        config = load_config(checkpoint)
    else:
        config = source
    if getattr(config, "is_encoder_decoder", False):
        raise XllmError("unsupported", f"{config.model_type!r} is an encoder-decoder model")
    if text_config(config) is not config:
        raise XllmError("unsupported", f"{config.model_type!r} is a multimodal model", help="compile its text model")
    length = _model_len(config, max_model_len)
    for name, limit in (
        ("max_num_seqs", max_num_seqs),
        ("max_num_batched_tokens", max_num_batched_tokens),
        ("max_num_logits", max_num_logits),
    ):
        if not 1 <= limit <= EXPORT_MAX:
            raise XllmError("option", f"{name}={limit} must be in 1..{EXPORT_MAX}")
    outputs = tuple(_OUTPUTS[name] for name in functions)
    model = build_model(config, dtype, length, checkpoint, head=STEP in functions)
    names: dict[str, str] = {}
    pooling, notes = _pooling(checkpoint) if EMBED in functions else (None, [])
    if checkpoint is not None and quantized is not None:
        names, leftovers = checkpoint_names(model, checkpoint)
        notes += untie(model, names, checkpoint, quantized.weights)
        notes += judge_leftovers(model, leftovers, checkpoint)
        notes += check_weights(model, names, checkpoint)
        _check_quantized(model, names, quantized)
    program, calls = export_model(model, outputs)
    for call in calls:
        decide(call)
    module = Module("graph")
    _declare(module, max_num_seqs, max_num_batched_tokens, max_num_logits)
    stored = quantized.weights if quantized is not None else {}
    slots: dict[str, Slot] = {}
    for place, name in enumerate(functions):
        imported = _StepImport(module, name, program, model, names, checkpoint, stored, dtype, length)
        imported.run(calls, place)
        func = module.func(name)
        _number_by_position(func)
        _drop_dead(func)
        check_rows(func)
        used = {op.name_ for op in func.ops if isinstance(op, ops.Param)}
        slots |= {n: s for n, s in imported.slots.items() if n in used}
    info = model_facts(
        config,
        model,
        checkpoint.generation if checkpoint else {},
        layers=len(calls),
        vocab=_vocabulary(module, model),
        dtype=dtype,
        max_model_len=length,
        pooling=pooling,
    )
    if checkpoint is not None:
        for slot in slots.values():
            if slot.key and slot.read is None:
                match(slot, checkpoint)
    if quantized is not None:
        notes += [*quantized.notes, *quantized.dequantized()]
    return Traced(module, info, WeightSource(slots, checkpoint, check_finite), tuple(notes))


def _pooling(checkpoint: Checkpoint | None) -> tuple[Pooling, list[str]]:
    """How @embed's rows are pooled; a config alone says nothing of it."""
    return (Pooling("last", True, None), []) if checkpoint is None else pooling_of(checkpoint)


def _vocabulary(module: Module, model: Any) -> int:
    """Items that may be drawn; of a model without a head those that may be read."""
    if STEP in module.funcs:
        return module.func(STEP).returns[0].shape[1].value
    return int(model.get_input_embeddings().weight.shape[0])


def _check_quantized(model: torch.nn.Module, names: Mapping[str, str], quantized: Quantized) -> None:
    """What quantized weights are made of is as it should be. Only weights [out, in] may be quantized: other modules
    store theirs in another order."""
    for name, key in names.items():
        if key in quantized.weights:
            module = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                raise XllmError(
                    "unsupported",
                    f"tensor {key!r} is the quantized weight of a {type(module).__name__}, not of a Linear",
                    where=str(quantized.view.path),
                )
            quantized.weights[key].check()


def _model_len(config: Any, wanted: int | None) -> int:
    lengths = model_lengths(config)
    if wanted is None:
        if lengths.trained is None:
            raise XllmError("option", "the model names no maximal length", help="give a max model length")
        return lengths.trained
    most = lengths.most or _MAX_MODEL_LEN
    if not 1 <= wanted <= most:
        raise XllmError("option", f"a max model length of {wanted} tokens", help=f"the model was made for 1 to {most}")
    return wanted


def _declare(module: Module, seqs: int, tokens: int, logits: int) -> None:
    scope = module.scope
    scope.declare("N", 1, tokens, why="tokens in this step, all requests flattened")
    scope.declare("B", 1, seqs, why="requests in this step")
    scope.declare("S", 0, logits, why="rows whose logits are wanted")
    scope.declare("P", 1, MAX_PAGES, why="KV pages in the pool")
    scope.assume(sym("N") - sym("B"), why="every request of a step has at least one token")


class _StepImport:
    """Builds one function from an exported program: @step, or another with the same inputs and states."""

    def __init__(
        self,
        module: Module,
        function: str,
        program: ExportedProgram,
        model: torch.nn.Module,
        names: Mapping[str, str],
        checkpoint: Checkpoint | None,
        stored: Mapping[str, StoredWeight],
        dtype: str,
        max_model_len: int,
    ) -> None:
        self.program = program
        self.names = names
        self.checkpoint = checkpoint
        self.stored = stored
        self.dtype = dtype
        self.slots: dict[str, Slot] = {}
        self.tied = tied_names(model)
        self.func = module.add_func(function)
        self.inputs = {
            spec.name: self.func.add_arg(spec.name, Tensor(spec.dtype, spec.dims()), spec.range)
            for spec in step_inputs(max_model_len, PAGE_TOKENS)
        }
        self.calls: list[AttendCall] = []
        self.caches: list[tuple[Value, Value]] = []  # argument, last version
        self.importer = Importer(Builder.at_end(self.func), self._symbols())

    def _symbols(self) -> dict[str, str]:
        """Export's names of the two traced sizes -> ours."""
        out: dict[str, str] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in ("ids", "sel"):
                size = node.meta["val"].shape[0]
                if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
                    raise XllmError("unsupported", f"the model fixes the number of its tokens at {size}")
                out[size.node.expr.name] = "N" if node.name == "ids" else "S"
        return out

    def run(self, calls: list[AttendCall], place: int) -> None:
        """Imports the graph; the function returns output number `place` of the program, and the caches."""
        self.calls = calls
        signature = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = signature[node.name]
            if spec.kind == InputKind.USER_INPUT:
                self.importer.env[node] = self.inputs[node.name]
            else:
                self.importer.env[node] = self._tensor(node, spec.kind, str(spec.target))
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                raise XllmError("unsupported", f"the model calls a subgraph ({node.target})")
        result = self.importer.run(self.program.graph, self._attend)[place]
        output = _OUTPUTS[self.func.name]
        if not isinstance(result, Value) or result.dtype != "f32" or result.tensor.rank != 2:
            raise XllmError("unsupported", f"the model does not end in {output} but in {result}")
        results = [result, *[last for _, last in self.caches]]
        self.func.set_returns(results, {i + 1: first for i, (first, _) in enumerate(self.caches)}, {0: output})

    def _tensor(self, node: fx.Node, kind: InputKind, target: str) -> Value:
        """A parameter, buffer or constant of the model as a param op; scalars become constants."""
        name = target.removeprefix("model.") if target.startswith("model.") else target
        meta = node.meta["val"]
        dtype = DTYPES.get(meta.dtype)
        if dtype is None:
            raise XllmError("unsupported", f"{name} is {meta.dtype}")
        shape = tuple(int(d) for d in meta.shape)
        builder = self.importer.b
        value = self._traced_value(target, kind)
        group = self.tied.get(name, (name,))
        key = next((self.names[n] for n in group if n in self.names), "")
        if value is not None and not key:
            if not shape:
                return builder.create(ops.Const, value=value.item(), dtype=dtype).result
            own = f"traced.{name}"
            self.slots[own] = Slot(own, dtype, shape, value=value)
            return builder.create(ops.Param, name=own, type=Tensor(dtype, shape)).result
        if self.checkpoint is not None and not key:
            raise XllmError(
                "checkpoint",
                f"tensor {name!r} is missing",
                where=str(self.checkpoint.path),
                help="the checkpoint does not hold all weights of the model that config.json describes",
            )
        if key in self.stored:
            return self._quantized(self.stored[key], dtype, shape)
        own = key or group[0]
        self.slots[own] = Slot(own, dtype, shape, key=own)
        return builder.create(ops.Param, name=own, type=Tensor(dtype, shape)).result

    def _quantized(self, weight: StoredWeight, dtype: str, shape: tuple[int, ...]) -> Value:
        """A weight that the checkpoint stores quantized: its parts as params, or the weight dequantized as one."""

        def part(suffix: str, dtype: str, shape: tuple[int, ...], read: Callable[[], Array]) -> Value:
            own = weight.name + suffix
            self.slots[own] = Slot(own, dtype, shape, key=weight.name, read=read)
            return self.importer.b.create(ops.Param, name=own, type=Tensor(dtype, shape)).result

        if weight.why:
            return part("", dtype, shape, lambda: weight.floats(dtype))
        format = weight.format
        table = (shape[0], format.groups(shape[1]))
        values = part(":values", "u8", shape, weight.values)
        scales = part(":scales", format.scale_dtype, table, weight.scales)
        zeros = part(":zeros", "u8", table, weight.zeros) if format.zeros else None
        create = self.importer.b.create
        return create(ops.Dequantize, values, scales, zeros=zeros, format=str(format), dtype=dtype).result

    def _traced_value(self, target: str, kind: InputKind) -> Array | None:
        """The value that the constructor or the trace gave to a buffer or constant; None for parameters."""
        if kind == InputKind.PARAMETER:
            return None
        tensor = self.program.constants.get(target)
        if tensor is None:
            tensor = self.program.state_dict.get(target)
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, torch._subclasses.FakeTensor):
            return None
        return to_numpy(tensor)

    def _attend(
        self,
        im: Importer,
        query: Value,
        key: Value,
        value: Value,
        sinks: Value | None,
        padding: Value | None,
        call: int,
    ) -> Item:
        """One attention call: writes this step's keys and values into a cache of its own, then attends over it."""
        if padding is not None and not _all_ones(padding):
            raise im.unsupported("attention with a padding mask of the model's own making")
        about = self.calls[call]
        (hq, hk), (dk, dv) = about.heads, about.dims
        n = sym("N")
        layer = len(self.caches)

        def rows(x: Value, heads: int, size: int) -> Value:
            if x.shape[2] is not n:
                raise im.unsupported(f"attention over {x.shape[2]} tokens that are not the step's")
            return im.cast(im.reshape(im.transpose(x, (0, 2, 1, 3)), (n, heads, size)), self.dtype)

        kv_type = Kv(self.dtype, hk, dk, dv, PAGE_TOKENS, sym("P"))
        first = self.func.add_arg(f"kv{layer}", kv_type)
        where = {"pos": self.inputs["pos"], "seq": self.inputs["seq"], "table": self.inputs["table"]}
        written = im.emit(ops.KvWrite, first, rows(key, hk, dk), rows(value, hk, dv), **where, hint=f"kv{layer}_")
        out = im.emit(
            ops.KvAttend,
            written,
            rows(query, hq, dk),
            **where,
            start=self.inputs["start"],
            sinks=sinks,
            scale=about.scale,
            window=about.window,
            softcap=about.softcap,
        )
        self.caches.append((first, written))
        return im.cast(im.reshape(out, (1, n, hq, dv)), im.dtype_of())


def _all_ones(v: Value) -> bool:
    """Whether v is certainly 1 (or true) everywhere."""
    while isinstance(v.op, (ops.Expand, ops.Reshape, ops.Cast)):
        v = v.op.x
    return isinstance(v.op, ops.Const) and v.op.value == 1


def _number_by_position(func: Func) -> None:
    """arange over the tokens becomes %pos.

    A model that numbers the tokens of its one sequence by their index means their position in it; in a step with many
    requests that is %pos. Where such a number is used for anything but its own token, `check_rows` finds out.
    """
    pos = func.arg("pos")
    for op in func.ops:
        if isinstance(op, ops.Iota) and op.size is pos.shape[0]:
            number = pos
            if op.result.dtype != "i32":
                number = Builder.before(op).create(ops.Cast, pos, dtype=op.result.dtype).result
            op.result.replace_all_uses_with(number)
            op.erase()


def to_numpy(tensor: torch.Tensor) -> Array:
    """A tensor as an array in the dtype that the IR gives it (64-bit integers as i32)."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        halves: Array = bits.view(ml_dtypes.bfloat16)
        return np.array(halves)
    array: Array = tensor.numpy()
    if array.dtype == np.int64:
        if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
            raise XllmError("unsupported", "the model holds integers beyond 32 bits")
        return array.astype(np.int32)
    return np.array(array)


def _drop_dead(func: Func) -> None:
    """Removes pure ops without uses: what the model computed and threw away must not be judged."""
    for op in reversed(list(func.ops)):
        if op.SPEC.pure and not any(r.has_uses for r in op.results):
            op.erase()
