"""What every module must fulfil. Owns the numbered invariants of all stages; verify_sched.py has those of streams and
verify_buf.py those of `buf`.

V1   An operand is an argument of the same function or the result of an earlier op of it; so is a returned value.
V2   Use-lists are exact: a value's uses are the operands that name it. Results and arguments know owner and index.
V3   An op's attributes are declared, complete and in their stored form, and its result types are those inferred now.
V4   Every symbol in a type, an attribute, an assumption or the arena size is declared in the module's scope.
V5   A state version is used up at most once, by one consuming operand or by one return. An op that yields a
     version uses up the one before, of the same type.
V6   Every read of a state version stands before the op that uses it up.
V7   A returned state is a version of exactly one state argument and says so with `alias`; nothing else aliases. The
     last version of a state that the function writes is returned.
V8   A future is used exactly once, by comm.wait.
V9   Every group named by an op or a partial type is declared; all groups are axes of one mesh of ranks.
V10  A partial sum reaches only a collective or a linear op, and is not returned.
V11  Arguments have names, and no two the same.
V12  Offsets (`at`) and an arena size stand in stage buf only.
V13, V14, V15  Stage buf: see verify_buf.py.
V16, V17, V18, V19  Streams and events: see verify_sched.py.
V20  No size in a type is negative, whatever the symbols are.
V21  A rank dim is a place in its group. No size in a type, no offset or arena size and no assumption depends on it: all
     ranks have the same shapes and the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.diag import IrError, blame
from xllm_compiler.ir.groups import check_groups, rank_symbols
from xllm_compiler.ir.ops.comm import Collective
from xllm_compiler.ir.spec import COMMON, Attr, dims_in
from xllm_compiler.ir.state import first_version, latest_version, readers, state_args, used_version, writers
from xllm_compiler.ir.types import Future, State, Tensor, Type, type_dims
from xllm_compiler.ir.verify_buf import check_buffers
from xllm_compiler.ir.verify_sched import check_order, check_stage, order_of


def verify(module: Module) -> None:
    """Raises the first violation as an IrError that shows the op and its neighbours."""
    for a in module.scope.assumptions:
        _check_symbols(module, [a.expr], f"assumption {a.expr} >= 0", None)
        _check_same_on_all_ranks(module, [a.expr], f"assumption {a.expr} >= 0", None)
    check_groups(module.groups, module.scope)
    for func in module.funcs.values():
        _check_order(func)
        _check_uses(func)
        _check_signature(module, func)
        # Before the types: inference would stumble over these two with a less telling number.
        for op in func.ops:
            _check_groups(module, op)
        _check_partial(func)
        _check_sizes(module, func)
        for op in func.ops:
            _check_types(op)
            _check_op_symbols(module, op)
            _check_stage(module, op)
        _check_states(func)
        _check_futures(func)
        check_stage(module, func)
        order = order_of(func)
        if order is not None:
            check_order(func, order)
        if module.stage == "buf":
            check_buffers(func, order)


def _check_order(func: Func) -> None:
    known: set[Value] = set(func.args)
    for op in func.ops:
        for i, v in enumerate(op.operands):
            if v not in known:
                raise blame(op, f"V1: operand {i} of {op.name}, %{v.name}, is {_origin(func, v)}")
        known.update(op.results)
    for v in func.returns:
        if v not in known:
            raise IrError(f"V1: returned value %{v.name} is {_origin(func, v)}", where=f"return of @{func.name}")


def _origin(func: Func, v: Value) -> str:
    if v.op is None:
        return f"an argument of @{v.owner.name}, another function" if v.owner is not func else "no longer an argument"
    if v.op.func is not func:
        return f"defined in @{v.op.func.name}, another function"
    return "defined later" if v.op.attached else f"the result of an erased {v.op.name}"


def _check_uses(func: Func) -> None:
    expected: dict[Value, set[tuple[Op, int]]] = {}
    for op in (*func.ops, func.ret):
        if op.func is not func:
            raise blame(op, f"V2: {op.name} stands in @{func.name} but belongs to @{op.func.name}")
        for i, r in enumerate(op.results):
            if r.owner is not op or r.index != i:
                raise blame(op, f"V2: result {i} of {op.name} names another owner")
            expected.setdefault(r, set())
        for i, v in enumerate(op.operands):
            expected.setdefault(v, set()).add((op, i))
        if sum(op.segments) != len(op.operands) or len(op.segments) != len(op.SPEC.operands):
            raise blame(op, f"V2: {op.name} has {len(op.operands)} operands for {list(op.segments)} per field")
    for i, a in enumerate(func.args):
        if a.owner is not func or a.index != i:
            raise IrError(f"V2: argument %{a.name} of @{func.name} names another owner or index")
        expected.setdefault(a, set())
    for v, uses in expected.items():
        if set(v.uses) != uses:
            text = f"V2: the use-list of %{v.name} has {len(v.uses)} entries, {len(uses)} operands name it"
            raise blame(v.op, text) if v.op is not None else IrError(text, where=f"@{func.name}")


def _check_signature(module: Module, func: Func) -> None:
    seen: set[str] = set()
    for a in func.args:
        if not a.name or a.name in seen:
            raise IrError(
                f"V11: @{func.name} has two arguments called %{a.name}" if a.name else "V11: unnamed argument"
            )
        seen.add(a.name)
        _check_symbols(module, type_dims(a.type), f"the type of %{a.name}", None)
        _check_same_on_all_ranks(module, type_dims(a.type), f"the type of %{a.name}", None)
    if func.arena is not None:
        _check_symbols(module, [func.arena], f"the arena size of @{func.name}", None)
        _check_same_on_all_ranks(module, [func.arena], f"the arena size of @{func.name}", None)
        if module.stage != "buf":
            raise IrError(f"V12: @{func.name} has an arena in stage {module.stage}")


def _check_sizes(module: Module, func: Func) -> None:
    checked: set[Dim] = set()
    for v in (*func.args, *(r for op in func.ops for r in op.results)):
        for dim in type_dims(v.type):
            if dim in checked:
                continue
            checked.add(dim)
            most = module.scope.bounds(dim)[1]
            if most is not None and most < 0:
                raise IrError(f"V20: an axis of {dim} elements, which is at most {most}", where=f"%{v.name}: {v.type}")


def _check_types(op: Op) -> None:
    spec = op.SPEC
    for attr in spec.attrs:
        if attr.name not in op.attrs:
            raise blame(op, f"V3: {op.name} lacks attribute {attr.name}")
    for name, value in op.attrs.items():
        field = spec.attr(name)
        if field is None:
            raise blame(op, f"V3: {op.name} has an undeclared attribute {name!r}")
        try:
            stored = field.coerce(value)
        except IrError as e:
            raise blame(op, f"V3: {op.name}: {e.message}", e.help) from None
        if type(stored) is not type(value) or (name in COMMON and field.is_default(stored)):
            raise blame(op, f"V3: {op.name}: attribute {name} is stored as {value!r}, not as {stored!r}")
    before = dict(op.attrs)
    try:
        types = op.infer()
    except IrError as e:
        raise blame(op, f"V3: {e.message}", e.help) from None
    if not _same_attrs(before, op.attrs):
        op.attrs = before
        raise blame(op, f"V3: {op.name} has attributes that are not in canonical form")
    have = tuple(r.type for r in op.results)
    if types != have:
        raise blame(op, f"V3: {op.name} yields {_types_text(types)}, its results say {_types_text(have)}")


def _same_attrs(a: dict[str, Attr], b: dict[str, Attr]) -> bool:
    # repr, because NaN does not equal itself and 1 equals 1.0.
    return a.keys() == b.keys() and all(a[k] is b[k] or repr(a[k]) == repr(b[k]) for k in a)


def _types_text(types: Iterable[Type]) -> str:
    return ", ".join(str(t) for t in types)


def _check_symbols(module: Module, dims: Iterable[Dim], what: str, op: Op | None) -> None:
    for d in dims:
        for name in d.symbols:
            if name not in module.scope.symbols:
                text, help = f"V4: {what} uses {name}, which is not declared", f"declare `dim {name} in [lo, hi]`"
                raise blame(op, text, help) if op is not None else IrError(text, help=help)


def _check_same_on_all_ranks(module: Module, dims: Iterable[Dim], what: str, op: Op | None) -> None:
    ranks = rank_symbols(module.groups)
    for d in dims if ranks else ():
        for name in d.symbols:
            if name in ranks:
                text = f"V21: {what} depends on {name}, the rank of @{ranks[name]}"
                help = (
                    "shapes and plan are the same on all ranks: a rank may choose where a t.slice begins, not its size"
                )
                raise blame(op, text, help) if op is not None else IrError(text, help=help)


def _check_op_symbols(module: Module, op: Op) -> None:
    for r in op.results:
        _check_symbols(module, type_dims(r.type), f"the type of %{r.name}", op)
        _check_same_on_all_ranks(module, type_dims(r.type), f"the type of %{r.name}", op)
    _check_same_on_all_ranks(module, dims_in([op.attrs.get("at", ())]), f"an offset of {op.name}", op)
    for name, value in op.attrs.items():
        _check_symbols(module, dims_in([value]), f"attribute {name}", op)


def _check_groups(module: Module, op: Op) -> None:
    named = [str(op.attrs[a.name]) for a in op.SPEC.attrs if a.kind == "group" and op.attrs[a.name]]
    named += [r.type.partial for r in op.results if isinstance(r.type, Tensor) and r.type.partial is not None]
    for group in named:
        if group not in module.groups:
            raise blame(op, f"V9: {op.name} names group @{group}, which is not declared", f"group @{group} size=..")


def _check_stage(module: Module, op: Op) -> None:
    if module.stage != "buf" and "at" in op.attrs:
        raise blame(op, f"V12: {op.name} has an offset in stage {module.stage}", "only stage buf has offsets")


def _check_states(func: Func) -> None:
    for op in func.ops:
        for r in op.results:
            if isinstance(r.type, State):
                _check_successor(op, r)
    for v in (*func.args, *(r for op in func.ops for r in op.results)):
        if isinstance(v.type, State):
            _check_version(func, v)
    _check_aliases(func)


def _check_successor(op: Op, version: Value) -> None:
    before = used_version(op)
    yielded = [r for r in op.results if isinstance(r.type, State)]
    if before is None or before.type != version.type or yielded != [version]:
        used = "nothing" if before is None else f"%{before.name}: {before.type}"
        text = f"V5: {op.name} yields state version %{version.name} and uses up {used}"
        raise blame(op, text, "an op yields one version, of the type of the one that it uses up")


def _check_version(func: Func, v: Value) -> None:
    ends = [*writers(v), *(func.ret for r in func.returns if r is v)]
    if len(ends) > 1:
        second = max((e for e in ends if e is not func.ret), key=func.ops.order, default=None)
        names = ", ".join(end.name for end in ends)
        text = f"V5: state version %{v.name} is used up {len(ends)} times, by {names}"
        if second is None:
            raise IrError(text, where=f"return of @{func.name}")
        raise blame(second, text, "write to the latest version, and return only that")
    if not ends or ends[0] is func.ret:
        return
    for op in readers(v):
        if not op.is_before(ends[0]):
            raise blame(op, f"V6: {op.name} reads state version %{v.name} after {ends[0].name} used it up")


def _check_aliases(func: Func) -> None:
    where = f"return of @{func.name}"
    taken: dict[Value, int] = {}
    for i, arg in func.aliases.items():
        if not 0 <= i < len(func.returns):
            raise IrError(f"V7: alias of return {i}, of which there are {len(func.returns)}", where=where)
        if arg not in func.args or not isinstance(arg.type, State) or func.returns[i].type != arg.type:
            text = f"V7: return {i}, {func.returns[i].type}, cannot alias %{arg.name}: {arg.type}"
            raise IrError(text, where=where, help="only states are aliased")
        if arg in taken:
            raise IrError(f"V7: returns {taken[arg]} and {i} both alias %{arg.name}", where=where)
        taken[arg] = i
    for i, v in enumerate(func.returns):
        if not isinstance(v.type, State):
            continue
        first = first_version(v)
        if func.aliases.get(i) is not first:
            said = f"aliases %{func.aliases[i].name}" if i in func.aliases else "aliases nothing"
            raise IrError(
                f"V7: returned state %{v.name} is a version of %{first.name} but {said}",
                where=where,
                help=f"write `alias %{first.name}` at its type in the signature",
            )
    for arg in state_args(func):
        if arg not in taken and writers(arg):
            last = latest_version(arg)
            raise IrError(
                f"V7: @{func.name} writes the state %{arg.name} and does not return it",
                where=where,
                help=f"return its last version, %{last.name}: {last.type} alias %{arg.name}",
            )


def _check_futures(func: Func) -> None:
    for a in func.args:
        if isinstance(a.type, Future):
            raise IrError(f"V8: argument %{a.name} of @{func.name} is a future; futures live inside a function")
    for op in func.ops:
        for r in op.results:
            if isinstance(r.type, Future):
                users = [u.name for u, _ in r.uses]
                if users != ["comm.wait"]:
                    used = f"used by {', '.join(users)}" if users else "never waited for"
                    raise blame(op, f"V8: future %{r.name} is {used}", "exactly one comm.wait must use it")


def _check_partial(func: Func) -> None:
    for op in (*func.ops, func.ret):
        for v in op.operands:
            if isinstance(v.type, Tensor) and v.type.partial is not None and not op.SPEC.linear:
                if isinstance(op, Collective):
                    continue  # V3: its type rule says which
                text = f"V10: partial sum %{v.name} over @{v.type.partial} reaches {op.name}"
                help = "comm.all_reduce_start and comm.wait it first"
                raise blame(op, text, help) if op is not func.ret else IrError(text, where=f"@{func.name}", help=help)
