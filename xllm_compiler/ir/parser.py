"""Text to IR. Owns the `.xir` grammar on the reading side; types are inferred again and compared with what is written.

Every refusal is an IrError that shows the line and a caret. What parses has passed all ops' type rules; the other
invariants are verify.py's.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn, TypeVar

from xllm_compiler.dims import Dim, parse_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir import ops as _ops  # registers every op  # noqa: F401
from xllm_compiler.ir.core import Builder, Func, Module, Op, Stage, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.lexer import Source, Token, tokenize
from xllm_compiler.ir.loc import Loc
from xllm_compiler.ir.opdef import OPS
from xllm_compiler.ir.spec import AttrField, Scalar
from xllm_compiler.ir.types import DTYPE_BYTES, MAX_SIZE, Cell, Event, Future, Kv, Tensor, Type
from xllm_compiler.step.interface import ValueRange

_STAGES: Final[dict[str, Stage]] = {"graph": "graph", "sched": "sched", "buf": "buf"}
_HALF: Final = re.compile("[\ud800-\udfff]")  # of a surrogate pair; stands for no character
MAX_OPS: Final = 50_000  # in a function; the step of the largest models has a fifth of that
_OPEN: Final = {"(": ")", "[": "]"}
_AFTER_DIM: Final = frozenset((",", ")", "]", "{", "}", ":", "=", ">="))
T = TypeVar("T")


def parse_module(text: str, filename: str = "<text>") -> Module:
    """The module written in `text`. `filename` is only for messages and the Loc of ops that carry none."""
    return _Parser(Source(text, filename)).module()


class _Parser:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.tokens, self.comments = tokenize(source)
        self.at = 0
        self.values: dict[str, Value] = {}
        self.dims: dict[str, Dim] = {}  # by text: a module writes few different ones, thousands of times

    # Tokens.

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def at_value(self) -> bool:
        return self.token.kind == "value"

    def next(self) -> Token:
        token = self.tokens[self.at]
        if token.kind != "end":
            self.at += 1
        return token

    def fail(self, message: str, token: Token | None = None, help: str = "") -> NoReturn:
        token = token or self.token
        raise self.source.error(message, token.start, token.end, help)

    def peek(self, text: str) -> bool:
        token = self.tokens[self.at]
        return token.text == text and token.kind in ("punct", "name")

    def accept(self, text: str) -> bool:
        token = self.tokens[self.at]
        if token.text == text and token.kind in ("punct", "name"):
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> Token:
        if not self.peek(text):
            self.fail(f"expected {text!r}, found {self.token.text or 'the end'!r}")
        return self.next()

    def kind(self, kind: str, what: str) -> Token:
        if self.token.kind != kind:
            self.fail(f"expected {what}, found {self.token.text or 'the end'!r}")
        return self.next()

    def guarded(self, start: Token, make: Callable[[], T]) -> T:
        """Runs `make`; an error in it is shown at `start`..the last token read."""
        try:
            return make()
        except XllmError as e:
            if isinstance(e, IrError) and e.where.startswith(self.source.filename + ":"):
                raise
            last = self.tokens[max(self.at - 1, 0)]
            raise self.source.error(e.message, start.start, max(last.end, start.end), e.help) from e

    def list_of(self, close: str, item: Callable[[], T]) -> list[T]:
        """Comma-separated items up to and including `close`."""
        out: list[T] = []
        if self.accept(close):
            return out
        while True:
            out.append(item())
            if self.accept(close):
                return out
            self.expect(",")

    # Scalars and types.

    def integer(self) -> int:
        sign = -1 if self.accept("-") else 1
        token = self.kind("number", "an integer")
        if not token.text.isdigit():
            self.fail("expected an integer", token)
        return sign * self.whole(token)

    def whole(self, token: Token) -> int:
        """The value of digits."""
        digits = token.text.lstrip("0")
        if len(digits) > 19 or int(digits or "0") > MAX_SIZE:
            self.fail(f"an integer of {len(digits)} digits", token, f"the largest one is {MAX_SIZE}")
        return int(digits or "0")

    def number(self) -> int | float:
        sign = -1 if self.accept("-") else 1
        if self.token.text in ("inf", "nan"):
            return sign * (math.inf if self.next().text == "inf" else math.nan)
        token = self.kind("number", "a number")
        if token.text.isdigit():
            return sign * self.whole(token)
        value = float(token.text)
        if math.isinf(value):
            self.fail("a number beyond all numbers", token, "inf is written as inf")
        return sign * value

    def string(self) -> str:
        token = self.kind("string", "a string")
        try:
            text: object = json.loads(token.text)
        except ValueError:
            text = None
        if not isinstance(text, str) or _HALF.search(text):
            self.fail("malformed string", token)
        return text

    def dim(self) -> Dim:
        """A dim expression: everything up to the first `,` or closing bracket that is not its own."""
        start = self.token
        stack: list[str] = []
        while self.tokens[self.at].kind != "end":
            text = self.tokens[self.at].text
            if not stack and text in _AFTER_DIM:
                break
            if text in _OPEN:
                stack.append(_OPEN[text])
            elif stack and text == stack[-1]:
                stack.pop()
            self.at += 1
        if self.token is start:
            self.fail(f"expected a dim, found {start.text or 'the end'!r}")
        text = self.source.text[start.start : self.tokens[self.at - 1].end]
        dim = self.dims.get(text)
        if dim is None:
            dim = self.dims[text] = self.guarded(start, lambda: parse_dim(text))
        return dim

    def read_type(self) -> Type:
        start = self.token
        if self.accept("!"):
            kind = self.kind("name", "`future` or `event`").text
            if kind == "event":
                return Event()
            if kind != "future":
                self.fail("expected `!future<...>` or `!event`", start)
            self.expect("<")
            if self.peek("!"):
                self.fail("a future is of a tensor", start)
            inner = self.read_type()
            self.expect(">")
            if not isinstance(inner, Tensor):
                self.fail("a future is of a tensor", start)
            return Future(inner)
        name = self.kind("name", "a type")
        if name.text == "kv":
            return self.kv_type(name)
        if name.text == "cell":
            return self.cell_type(name)
        if name.text not in DTYPE_BYTES:
            self.fail(f"unknown dtype {name.text!r}", name, "one of " + ", ".join(DTYPE_BYTES))
        self.expect("[")
        shape = self.list_of("]", self.dim)
        partial = None
        if self.accept("partial"):
            self.expect("(")
            partial = self.group()
            self.expect(")")
        return self.guarded(name, lambda: Tensor(name.text, shape, partial))

    def kv_type(self, start: Token) -> Kv:
        self.expect("<")
        dtype = self.kind("name", "a dtype").text
        sizes: list[int] = []
        for key in ("heads", "k", "v", "page"):
            self.expect(",")
            self.expect(key)
            self.expect("=")
            sizes.append(self.integer())
        self.expect(">")
        self.expect("[")
        pages = self.dim()
        self.expect("]")
        return self.guarded(start, lambda: Kv(dtype, sizes[0], sizes[1], sizes[2], sizes[3], pages))

    def cell_type(self, start: Token) -> Cell:
        self.expect("<")
        dtype = self.kind("name", "a dtype").text
        self.expect(",")
        self.expect("[")
        shape = self.list_of("]", self.integer)
        self.expect(">")
        self.expect("[")
        slots = self.dim()
        self.expect("]")
        return self.guarded(start, lambda: Cell(dtype, shape, slots))

    def group(self) -> str:
        return self.kind("global", "a @group").text[1:]

    def attr(self, field: AttrField) -> object:
        if field.many:
            self.expect("[")
            return tuple(self.list_of("]", lambda: self.attr_scalar(field)))
        return self.attr_scalar(field)

    def attr_scalar(self, field: AttrField) -> Scalar:
        match field.kind:
            case "dim":
                return self.dim()
            case "str":
                return self.string()
            case "group":
                return self.group()
            case "dtype" | "enum":
                return self.kind("name", f"a {field.kind}").text
            case "bool":
                if self.token.text not in ("true", "false"):
                    self.fail("expected true or false")
                return self.next().text == "true"
            case "int":
                return self.integer()
            case "type":
                return self.read_type()
            case "float" | "number":
                if field.kind == "number" and self.token.text in ("true", "false"):
                    return self.next().text == "true"
                return self.number()

    # Module, functions, ops.

    def module(self) -> Module:
        self.expect("xir")
        version = self.token
        if self.integer() != 1:
            self.fail(f"xir version {version.text} is not known", version, "this compiler reads version 1")
        self.expect("stage")
        self.expect("=")
        stage = self.kind("name", "a stage")
        if stage.text not in _STAGES:
            self.fail(f"unknown stage {stage.text!r}", stage, "one of " + ", ".join(_STAGES))
        module = Module(_STAGES[stage.text])
        while self.token.kind != "end":
            start = self.token
            if start.kind == "assume":
                self.next()
                expr = self.guarded(start, partial(parse_dim, start.text))
                module.scope.assume(expr, why=self.why(start))
            elif self.accept("dim"):
                self.declare(module, start)
            elif self.accept("group"):
                name = self.group()
                if name in module.groups:
                    self.fail(f"group @{name} is declared twice", start)
                module.groups[name] = self.rank_group()
            elif self.accept("func"):
                self.func(module)
            else:
                self.fail(f"expected dim, assume, group or func, found {start.text!r}")
        return module

    def why(self, token: Token) -> str:
        return self.comments.get(token.line, "")

    def declare(self, module: Module, start: Token) -> None:
        name = self.kind("name", "a symbol").text
        self.expect("in")
        self.expect("[")
        lo = None if self.accept("*") else self.integer()
        self.expect(",")
        hi = None if self.accept("*") else self.integer()
        self.expect("]")
        multiple = self.integer() if self.accept("%") else 1
        self.guarded(start, lambda: module.scope.declare(name, lo, hi, multiple, self.why(start)))

    def rank_group(self) -> RankGroup:
        start = self.expect("size")
        self.expect("=")
        size, stride, rank = self.integer(), 1, ""
        if self.accept("stride"):
            self.expect("=")
            stride = self.integer()
        if self.accept("rank"):
            self.expect("=")
            rank = self.kind("name", "a symbol").text
        return self.guarded(start, lambda: RankGroup(size, stride, rank))

    def func(self, module: Module) -> None:
        name = self.kind("global", "a @name")
        func = self.guarded(name, lambda: module.add_func(name.text[1:]))
        self.values = {}
        self.expect("(")
        self.list_of(")", lambda: self.argument(func))
        self.expect("->")
        start = self.expect("(")
        declared: list[Type] = []
        aliases: dict[int, Value] = {}
        outputs: dict[int, str] = {}

        def result() -> None:
            if self.token.kind == "name" and self.tokens[self.at + 1].text == ":":
                outputs[len(declared)] = self.kind("name", "the name of an output").text
                self.expect(":")
            declared.append(self.read_type())
            if self.accept("alias"):
                aliases[len(declared) - 1] = self.operand()

        self.list_of(")", result)
        if self.accept("arena"):
            self.expect("(")
            func.arena = self.dim()
            self.expect(")")
        self.expect("{")
        builder = Builder.at_end(func)
        first = self.token
        while not self.peek("return"):
            if len(func.ops) >= MAX_OPS:
                self.fail(f"@{func.name} has more than {MAX_OPS} ops", first)
            if self.token.kind == "end" or self.peek("}"):
                self.fail(f"@{func.name} ends without `return`")
            self.op(builder)
        returns = self.returned()
        self.expect("}")
        types = [v.type for v in returns]
        if types != declared:
            got, want = ", ".join(map(str, types)), ", ".join(map(str, declared))
            self.fail(f"@{func.name} returns ({got}), its signature says ({want})", start)
        func.set_returns(returns, aliases, outputs)

    def returned(self) -> list[Value]:
        self.expect("return")
        if self.peek("}"):
            return []
        out = [self.operand()]
        while self.accept(","):
            out.append(self.operand())
        return out

    def argument(self, func: Func) -> None:
        token = self.kind("value", "an argument %name")
        self.expect(":")
        ty = self.read_type()
        limits: ValueRange | None = None
        if self.accept("in"):
            self.expect("[")
            low = self.integer()
            self.expect(",")
            limits = ValueRange(low, self.integer())
            self.expect("]")
        self.define(token, self.guarded(token, lambda: func.add_arg(token.text[1:], ty, limits)))

    def define(self, token: Token, value: Value) -> None:
        if token.text in self.values:
            self.fail(f"{token.text} is defined twice", token)
        self.values[token.text] = value

    def operand(self) -> Value:
        token = self.kind("value", "a %value")
        if token.text not in self.values:
            self.fail(f"{token.text} is not defined before this use", token)
        return self.values[token.text]

    def op(self, builder: Builder) -> None:
        start = self.token
        results: list[Token] = []
        if start.kind == "value":
            results.append(self.next())
            while self.accept(","):
                results.append(self.kind("value", "a result %name"))
            self.expect("=")
        name = self.kind("name", "an op name")
        cls = OPS.get(name.text)
        if cls is None:
            near = difflib.get_close_matches(name.text, OPS, n=1)
            self.fail(f"unknown op {name.text}", name, f"did you mean {near[0]}?" if near else "")
        operands: list[Value] = []
        fields: dict[str, object] = {}
        self.expect("(")
        self.list_of(")", lambda: self.op_item(cls, operands, fields))
        types: list[Type] = []
        annotated = self.token
        if self.accept(":"):
            annotated = self.token
            types.append(self.read_type())
            while self.accept(","):
                types.append(self.read_type())
        end = self.tokens[self.at - 1]
        for attr in cls.SPEC.attrs:
            if attr.kind == "type":
                if not types:
                    self.fail(f"{name.text} takes its type from the annotation after `:`", name)
                fields[attr.name] = types[0]
        loc = self.loc(start)
        hints = [t.text[1:] for t in results]

        def create() -> Op:
            return builder.create(cls, *operands, loc=loc, hint=hints, **fields)

        made = self.guarded(name, create)
        if len(results) != len(made.results):
            self.fail(f"{name.text} has {len(made.results)} results, {len(results)} are named", start)
        got = [r.type for r in made.results]
        if got != types:
            text = ", ".join(map(str, got))
            raise self.source.error(f"{name.text} yields {text}, not what is written", annotated.start, end.end)
        for token, value in zip(results, made.results, strict=True):
            self.define(token, value)

    def op_item(self, cls: type[Op], operands: list[Value], fields: dict[str, object]) -> None:
        if self.at_value():
            operands.append(self.operand())
            return
        key = self.kind("name", "an operand or key=value")
        self.expect("=")
        if key.text in fields:
            self.fail(f"{key.text} is given twice", key)
        if self.at_value():
            fields[key.text] = self.operand()
            return
        field = cls.SPEC.attr(key.text)
        if field is None or field.kind == "type":
            known = [f.name for f in cls.SPEC.operands] + [a.name for a in cls.SPEC.attrs]
            self.fail(f"{cls.SPEC.name} has no attribute {key.text!r}", key, "it has " + ", ".join(known))
        fields[key.text] = self.attr(field)

    def loc(self, start: Token) -> Loc:
        if not self.accept("loc"):
            return Loc(self.source.filename, start.line)
        self.expect("(")
        file = self.string()
        self.expect(":")
        line = self.integer()
        path, lineage = "", []
        if self.accept(","):
            path = self.string()
        while self.accept(","):
            lineage.append(self.string())
        self.expect(")")
        return Loc(file, line, path, tuple(lineage))
