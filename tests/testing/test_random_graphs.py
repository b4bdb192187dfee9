"""Laws of the IR over drawn graphs: text, copies, interpreter and preset agree; and what shrinking ends with."""

from __future__ import annotations

from hypothesis import HealthCheck, find, given, settings

from xllm_compiler.interp import run_ranks
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.ops import AllReduceStart, KvAttend, LinearGlu
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.verify import verify
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.testing.equiv import check_equal
from xllm_compiler.testing.inputs import make
from xllm_compiler.testing.strategies import xir_modules

LAWS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FEW = settings(LAWS, max_examples=12)


@LAWS
@given(xir_modules())
def test_text_copy_and_hash_agree_and_it_runs(module: Module) -> None:
    verify(module)
    text, digest = print_module(module), structural_hash(module)
    for other in (parse_module(text, "again.xir"), clone_module(module)):
        verify(other)
        assert print_module(other) == text and structural_hash(other) == digest
    for func in module.funcs.values():
        given_ = make(func, {})
        results = run_ranks(module, func.name, given_.inputs, given_.params, given_.dims)
        assert all(len(rank) == len(func.returns) for rank in results)


@FEW
@given(xir_modules(size=6))
def test_the_preset_keeps_the_meaning(module: Module) -> None:
    after = clone_module(module)
    run_pipeline("@cpu", after, PassContext())
    assert check_equal(module, after) is None


def names(module: Module) -> list[str]:
    return [op.name for f in module.funcs.values() for op in f.ops]


def smallest(cls: type) -> Module:
    """What hypothesis makes of "a module with such an op breaks the test"."""
    wanted = lambda m: any(isinstance(op, cls) for f in m.funcs.values() for op in f.ops)  # noqa: E731
    return find(xir_modules(size=6), wanted, settings=settings(LAWS, max_examples=400))


def test_shrinking_ends_small() -> None:
    glu = smallest(LinearGlu)
    assert names(glu)[-3:] == ["nn.linear_glu", "nn.linear", "t.tanh"]
    assert set(names(glu)[:-3]) == {"param"} and len(names(glu)) <= 6  # a bias more or less
    assert [a.name for a in glu.func().args] == ["x"] and not glu.groups and list(glu.scope.symbols) == ["N"]
    reduced = smallest(AllReduceStart)
    assert names(reduced) == ["param", "nn.linear", "comm.all_reduce_start", "comm.wait", "t.tanh"]
    assert reduced.groups == {"tp": RankGroup(1)}
    assert len(names(smallest(KvAttend))) <= 8
