"""Laws over generated modules: text is a fixed point, copies are equal, rewriting keeps soundness and meaning."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.ops import Linear, LinearGlu, Neg
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, erase_dead, rule
from xllm_compiler.ir.verify import verify
from xllm_compiler.testing.equiv import check_equal
from xllm_compiler.testing.graphs import random_module

LAWS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def modules(draw: st.DrawFn) -> Module:
    return random_module(lambda n: draw(st.integers(0, n - 1)), size=14)


@LAWS
@given(modules())
def test_text_is_a_fixed_point(module: Module) -> None:
    verify(module)
    for loc in (False, True):
        text = print_module(module, loc)
        again = parse_module(text, "again.xir")
        verify(again)
        assert print_module(again, loc) == text or loc  # parsed ops without a loc get the text's own
        assert structural_hash(again) == structural_hash(module)
        assert print_module(parse_module(print_module(again, True)), True) == print_module(again, True)


@LAWS
@given(modules())
def test_a_clone_is_equal_and_independent(module: Module) -> None:
    text, digest = print_module(module, True), structural_hash(module)
    copy = clone_module(module)
    verify(copy)
    assert print_module(copy, True) == text and structural_hash(copy) == digest
    for op in copy.funcs["step"].ops:
        op.attrs["at"] = ()
        op.loc = op.loc.touched_by("x/y")
    copy.funcs["step"].set_returns([])
    copy.groups["other"] = RankGroup(3)
    copy.scope.declare("Z", 0, 1)
    assert erase_dead(copy.funcs["step"]) > 0 or not list(copy.funcs["step"].ops)
    assert structural_hash(copy) != digest
    assert print_module(module, True) == text and structural_hash(module) == digest
    verify(module)


@rule(LinearGlu)
def glu_twice(op: LinearGlu, rw: Rewriter) -> bool:
    """Rewrites in one direction only, creating work for the others: y -> -(-y)."""
    if op.act != "gelu_tanh" or any(isinstance(u, Neg) for u in op.result.users):
        return False
    first = rw.create(LinearGlu, op.x, op.w, op.bias, act=op.act)
    rw.replace(op, rw.create(Neg, rw.create(Neg, first.result).result))
    return True


@rule(Linear)
def split_residual(op: Linear, rw: Rewriter) -> bool:
    from xllm_compiler.ir.ops import Add

    if op.residual is None:
        return False
    y = rw.create(Linear, op.x, op.w, op.bias, act=op.act)
    rw.replace(op, rw.create(Add, y.result, op.residual))
    return True


@LAWS
@given(modules(), st.integers(0, 5))
def test_rewriting_keeps_soundness_and_meaning(module: Module, seed: int) -> None:
    copy = clone_module(module)
    func = copy.funcs["step"]
    apply_rules(func, [glu_twice, split_residual], "test")
    verify(copy)
    assert not any(isinstance(op, Linear) and op.residual is not None for op in func.ops)
    assert not apply_rules(func, [glu_twice, split_residual], "test").changed
    assert check_equal(module, copy, [{}], typed=False, seed=seed) is None
