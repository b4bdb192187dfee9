"""Versions of states: which op uses one up, which argument it began as, who reads it. Owns walking along that chain.

%c1 = state.write(%c0, %x, %slot)     uses up %c0, the argument, and yields %c1, its next version
"""

from __future__ import annotations

from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.types import State


def used_version(op: Op) -> Value | None:
    """The version of a state that `op` uses up; None where it writes to none."""
    return op.field(op.SPEC.consumes)[0] if op.SPEC.consumes else None


def previous_version(version: Value) -> Value | None:
    """The version of which `version` was made; None for an argument."""
    return None if version.op is None else used_version(version.op)


def first_version(version: Value) -> Value:
    """Where the chain of a version begins: an argument, in a module that verifies."""
    while (before := previous_version(version)) is not None:
        version = before
    return version


def latest_version(version: Value) -> Value:
    """The end of the chain of a version."""
    while found := [r for op in writers(version) for r in op.results if isinstance(r.type, State)]:
        version = found[0]
    return version


def writers(version: Value) -> list[Op]:
    """The ops that use up a version: at most one, in a module that verifies."""
    return [op for op in version.users if used_version(op) is version]


def readers(version: Value) -> list[Op]:
    """The ops that use a version and leave it as it is. Returning is none of them."""
    return [op for op in version.users if used_version(op) is not version and op is not op.func.ret]


def state_args(func: Func) -> list[Value]:
    """The arguments that are states, in order."""
    return [arg for arg in func.args if isinstance(arg.type, State)]


def chain_ops(arg: Value) -> list[Op]:
    """All ops that use any version of the state argument `arg`, in list order. Returning is none of them."""
    found: dict[Op, None] = {}
    versions = [arg]
    for version in versions:
        for op in version.users:
            if op is op.func.ret:
                continue
            found[op] = None
            if used_version(op) is version:
                versions += [r for r in op.results if isinstance(r.type, State)]
    return sorted(found, key=lambda op: op.func.ops.order(op))
