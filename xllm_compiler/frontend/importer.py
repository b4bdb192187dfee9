"""From torch.export's graph to the IR: one walk over the nodes, one handler per aten operation.

Owns the environment (which IR value, Dim or Python value a node stands for), scalars and dtypes, source locations, and
in-place operations. The handlers stand in `frontend/aten/`. It translates one to one and improves nothing: that is the
business of passes. What has no handler is an XllmError("unsupported") naming the operation and the model's source line.

Torch's 64-bit integers become i32: the only integers in a step are token ids, positions and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.sympy_dims import to_dim
from xllm_compiler.ir.core import Builder, Op, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.loc import Loc
from xllm_compiler.ir.ops import Cast, Concat, Const, Expand, Reshape, Slice, Transpose

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i32",
    torch.int32: "i32",
    torch.int16: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}

# What a node may stand for: a value, a size, a Python scalar, or a list of those (split, chunk).
Item = Any
Handler = Callable[..., Item]

ATEN: dict[str, Handler] = {}
# Operations whose result may share memory with their first argument: matters only where something writes in place.
VIEWS: set[str] = set()

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')


def handles(*names: str, view: bool = False) -> Callable[[Handler], Handler]:
    """Registers a handler `(importer, **arguments by schema name)`; `self` is called `x` and `from` is `from_`."""

    def declare(handler: Handler) -> Handler:
        for name in names:
            if name in ATEN:
                raise XllmError("internal", f"{name} has two handlers")
            ATEN[name] = handler
            if view:
                VIEWS.add(name)
        return handler

    return declare


def short_path(path: str) -> str:
    """A source file without the machine's part of its path: artifacts must not depend on where things are installed."""
    for root in ("site-packages/", "dist-packages/"):
        if root in path:
            return path.rpartition(root)[2]
    return path.rpartition("/")[2]


def location(node: fx.Node) -> Loc:
    """The model's innermost source line for a node, and the path of the module it was run in."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    file, line = (short_path(frames[-1][0]), int(frames[-1][1])) if frames else ("", 0)
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return Loc(file, line, "" if path == "model" else path.removeprefix("model."), ())


class Importer:
    """The state of one import. Handlers use `emit`, `number`, `cast`, `shape_of` and the helpers below."""

    def __init__(self, builder: Builder, symbols: Mapping[str, str]) -> None:
        self.b = builder
        self.symbols = symbols
        self.env: dict[fx.Node, Item] = {}
        self.node: fx.Node
        self.loc = Loc()
        self._base: dict[fx.Node, fx.Node] = {}
        self._order: dict[fx.Node, int] = {}

    # ---- walking

    def run(self, graph: fx.Graph, attend: Handler) -> list[Item]:
        """Translates every node after the placeholders, which must be in `env` already; returns the outputs."""
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            self.node = node
            if node.op == "placeholder" or node.op == "get_attr":
                continue
            if node.op == "output":
                outputs: list[Item] = [self.value(a) for a in node.args[0]]
                return outputs
            self.loc = location(node)
            self.b.loc = self.loc
            try:
                self.env[node] = self._call(node, attend)
            except IrError as e:
                raise self.unsupported(f"{e.message}{'; ' + e.help if e.help else ''}") from e
            except XllmError as e:
                if e.where:
                    raise
                raise XllmError(e.kind, e.message, where=self.where(), help=e.help) from e
        raise XllmError("internal", "the traced graph has no output")

    def _call(self, node: fx.Node, attend: Handler) -> Item:
        name = str(node.target)
        if not isinstance(node.target, torch._ops.OpOverload):
            handler = ATEN.get(getattr(node.target, "__name__", name))
            if handler is None:
                raise self.unsupported(f"{name} has no translation")
            return handler(self, *[self.value(a) for a in node.args])
        if name == "xllm.attend.default":
            handler = attend
        else:
            found = ATEN.get(name)
            if found is None and name.rpartition(".")[0].endswith("_"):
                return self._in_place(node, name)
            if found is None:
                raise self.unsupported(f"{name} has no translation")
            handler = found
        if name in VIEWS and isinstance(node.args[0], fx.Node):
            self._base[node] = self.base(node.args[0])
        return handler(self, **self._bind(node))

    def _bind(self, node: fx.Node) -> dict[str, Item]:
        """The node's arguments by schema name, defaults filled in."""
        assert isinstance(node.target, torch._ops.OpOverload)
        out: dict[str, Item] = {}
        for i, argument in enumerate(node.target._schema.arguments):
            name = {"self": "x", "from": "from_"}.get(argument.name, argument.name)
            if i < len(node.args):
                out[name] = self.value(node.args[i])
            elif argument.name in node.kwargs:
                out[name] = self.value(node.kwargs[argument.name])
            elif argument.has_default_value():
                out[name] = argument.default_value
        return out

    def base(self, node: fx.Node) -> fx.Node:
        """The node whose memory `node` may be a view of; itself when it is not a view."""
        return self._base.get(node, node)

    def _in_place(self, node: fx.Node, name: str) -> Item:
        """`x.mul_(y)`: the same as `mul`, and from here on x is the result, which needs that nothing else sees x."""
        packet, _, overload = name.rpartition(".")
        handler = self._write if packet == "aten.copy_" else ATEN.get(f"{packet[:-1]}.{overload}")
        target = node.args[0]
        if handler is None or not isinstance(target, fx.Node) or packet.endswith("__"):
            raise self.unsupported(f"{name} has no translation")
        here, root = self._order[node], self.base(target)
        old = self.env[root]
        if root.op != "call_function" or not isinstance(old, Value):
            raise self.unsupported(f"{name} writes to a tensor that is not its own")
        # Nodes that stand for the whole tensor see the write; a view made before and read after it would have to, too.
        made = [n for n in self.env if self.base(n) is root]
        whole = [n for n in made if self.env[n] is old]
        for view in made:
            if view not in whole and any(self._order[u] > here for u in view.users):
                raise self.unsupported(f"{name} writes to a tensor that is seen through another view later")
        if target not in whole and packet != "aten.copy_":
            raise self.unsupported(f"{name} writes to a part of a tensor")
        result = handler(self, **self._bind(node))
        assert isinstance(result, Value)
        result = self.expand(self.cast(result, old.dtype), old.shape)
        self.env.update(dict.fromkeys([*whole, node], result))
        self._base[node] = root
        return result

    def _write(self, _: Importer, x: Value, src: Value, non_blocking: bool = False) -> Value:
        """`x[.., a:b] = src` for a slice x of a tensor of the model's own: that tensor, with the part replaced."""
        target = self.node.args[0]
        assert isinstance(target, fx.Node)
        whole = self.env[self.base(target)]
        part, slices = x, []
        while part is not whole:
            made = part.op
            if not isinstance(made, Slice) or made.step != 1:
                raise self.unsupported("writing to a part of a tensor that is not a plain slice")
            slices.append(made)
            part = made.x
        new = self.expand(self.cast(src, x.dtype), x.shape)
        for made in slices:
            axis, size = made.axis, made.x.shape[made.axis]
            parts = [new]
            if made.start is not as_dim(0):
                parts.insert(0, self.emit(Slice, made.x, axis=axis, start=0, stop=made.start))
            if made.stop is not size:
                parts.append(self.emit(Slice, made.x, axis=axis, start=made.stop, stop=size))
            new = parts[0] if len(parts) == 1 else self.emit(Concat, *parts, axis=axis)
        return new

    # ---- reading arguments

    def value(self, arg: Any) -> Item:
        """What a node's argument stands for."""
        if isinstance(arg, fx.Node):
            if arg not in self.env:
                raise self.unsupported(f"{arg.name} ({arg.op}) has no value")
            return self.env[arg]
        if isinstance(arg, (list, tuple)):
            return [self.value(a) for a in arg]
        if isinstance(arg, torch.SymInt):
            return to_dim(arg, self.symbols)
        return arg

    def shape_of(self, index: int | None = None) -> tuple[Dim, ...]:
        """The traced shape of the current node's result (or of the index-th one), as Dims."""
        meta = self.node.meta["val"]
        tensor = meta if index is None else meta[index]
        return tuple(to_dim(d, self.symbols) for d in tensor.shape)

    def dtype_of(self) -> str:
        """The traced dtype of the current node's result."""
        return self.dtype(self.node.meta["val"].dtype)

    def dtype(self, dtype: torch.dtype) -> str:
        if dtype not in DTYPES:
            raise self.unsupported(f"{self.node.target} makes {dtype}")
        return DTYPES[dtype]

    def size(self, value: Item) -> Dim:
        """A size argument: an int or a Dim."""
        if isinstance(value, bool) or not isinstance(value, (int, Dim)):
            raise self.unsupported(f"{self.node.target} takes a size that is {value!r}")
        return as_dim(value)

    # ---- making ops

    def emit(self, cls: type[Op], *operands: Value | None, **attrs: Any) -> Value:
        """A new op with one result."""
        return self.b.create(cls, *operands, **attrs).result

    def number(self, value: Item, dtype: str) -> Value:
        """An operand of an elementwise op of `dtype`: a Value is cast, a Python number is a rank-0 constant.

        Torch computes 16-bit floats with Python numbers in f32, so the constant is f32: next to a 16-bit tensor it
        takes that dtype without being rounded first.
        """
        if isinstance(value, Value):
            return self.cast(value, dtype)
        return self.constant(value, "f32" if dtype in ("bf16", "f16") else dtype)

    def constant(self, value: Item, dtype: str) -> Value:
        """A rank-0 constant that is itself of `dtype`."""
        if isinstance(value, Dim):
            if not value.is_const:
                raise self.unsupported(f"{self.node.target} computes with the size {value}")
            value = value.value
        if not isinstance(value, (bool, int, float)):
            raise self.unsupported(f"{self.node.target} with the constant {value!r}")
        if dtype in ("f32", "bf16", "f16", "f64"):
            return self.emit(Const, value=float(value), dtype=dtype)
        return self.emit(Const, value=value, dtype=dtype)

    def cast(self, x: Value, dtype: str) -> Value:
        """x itself when it has that dtype."""
        if x.dtype == dtype:
            return x
        if x.op is not None and isinstance(x.op, Const):
            value = x.op.value
            if dtype != "bool" and (isinstance(value, (int, bool)) or dtype in ("f32", "f64")):
                return self.constant(value, dtype)
        return self.emit(Cast, x, dtype=dtype)

    def reshape(self, x: Value, shape: Sequence[Dim | int]) -> Value:
        """x itself when it has that shape."""
        wanted = tuple(as_dim(d) for d in shape)
        return x if x.shape == wanted else self.emit(Reshape, x, shape=wanted)

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        return x if list(perm) == list(range(len(perm))) else self.emit(Transpose, x, perm=tuple(perm))

    def expand(self, x: Value, shape: Sequence[Dim | int]) -> Value:
        """x itself when it has that shape."""
        wanted = tuple(as_dim(d) for d in shape)
        return x if x.shape == wanted else self.emit(Expand, x, shape=wanted)

    # ---- failing

    def where(self) -> str:
        return self.loc.describe() or str(self.node)

    def unsupported(self, message: str) -> XllmError:
        """An error at the current node; names the operation where the message does not."""
        name = str(self.node.target)
        text = message if name in message else f"{name}: {message}"
        return XllmError("unsupported", text, where=self.where())
