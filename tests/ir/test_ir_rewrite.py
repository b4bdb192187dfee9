"""The worklist driver: fixed point, dead code, lineage, honesty."""

from collections.abc import Sequence

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder, Module, Op
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.loc import Loc
from xllm_compiler.ir.ops import Add, AddRmsNorm, AllReduceStart, Neg, RmsNorm, Silu, Wait
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_func
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, erase_dead, rule
from xllm_compiler.ir.verify import verify

HEAD = """xir 1 stage=graph
dim N in [1, 64]
group @tp size=1
func @f(%x: f32[N, 8], %y: f32[N, 8], %w: f32[8]) -> (f32[N, 8], f32[N, 8]) {
"""


def parse(body: str) -> Module:
    return parse_module(HEAD + body + "}\n", "t.xir")


def body(module: Module) -> list[str]:
    return [line.strip() for line in print_func(module.funcs["f"]) if line.startswith("  ")]


@rule(RmsNorm)
def fuse_add(op: RmsNorm, rw: Rewriter) -> bool:
    add = op.x.op
    if not isinstance(add, Add) or op.w is None:
        return False
    fused = rw.create(AddRmsNorm, add.a, add.b, op.w, eps=op.eps, hint=[op.result.name, add.result.name])
    rw.replace_value(add.result, fused.results[1])
    rw.replace(op, fused.results[0])
    return True


@rule(Neg)
def double_neg(op: Neg, rw: Rewriter) -> bool:
    inner = op.x.op
    if not isinstance(inner, Neg):
        return False
    rw.replace(op, inner.x)
    return True


def test_fusing_names_lineage_and_dead_code() -> None:
    module = parse(
        """  %s = t.add(%x, %y) : f32[N, 8]
  %unused = t.silu(%s) : f32[N, 8]
  %h = nn.rms_norm(%s, w=%w, eps=1e-05) : f32[N, 8]
  %out = t.neg(%h) : f32[N, 8]
  return %out, %s
"""
    )
    func = module.funcs["f"]
    func.ops[2].loc = Loc("m.py", 5, "layers.0", ("earlier/rule",))
    stats = apply_rules(func, [fuse_add, double_neg], "fuse-norm")
    assert stats.hits == {"fuse-add": 1, "double-neg": 0} and stats.erased == 2 and stats.changed
    assert body(module) == [
        "%h, %s = nn.add_rms_norm(%x, %y, %w, eps=1e-05) : f32[N, 8], f32[N, 8]",
        "%out = t.neg(%h) : f32[N, 8]",
        "return %out, %s",
    ]
    assert func.ops[0].loc == Loc("m.py", 5, "layers.0", ("earlier/rule", "fuse-norm/fuse-add"))
    verify(module)
    again = apply_rules(func, [fuse_add, double_neg], "fuse-norm")
    assert not again.changed and not again


def test_runs_to_a_fixed_point_and_keeps_names() -> None:
    lines = ["  %v0 = t.neg(%x) : f32[N, 8]"]
    lines += [f"  %v{i} = t.neg(%v{i - 1}) : f32[N, 8]" for i in range(1, 9)]
    module = parse("\n".join(lines) + "\n  return %v8, %v7\n")
    stats = apply_rules(module.funcs["f"], [double_neg], "p")
    assert body(module) == ["%v8 = t.neg(%x) : f32[N, 8]", "return %v8, %x"]
    assert stats.hits["double-neg"] >= 4
    verify(module)


@rule(Neg)
def only_single_use(op: Neg, rw: Rewriter) -> bool:
    if not op.result.has_one_use or op.x.op is not None:
        return False
    rw.replace(op, rw.create(Silu, op.x))
    return True


def test_dead_users_do_not_count() -> None:
    # %n has a dead second user, which stands after it and dies only when its own dead user does.
    module = parse(
        """  %n = t.neg(%x) : f32[N, 8]
  %live = t.exp(%n) : f32[N, 8]
  %dead = t.exp(%n) : f32[N, 8]
  %deader = t.exp(%dead) : f32[N, 8]
  return %live, %y
"""
    )
    stats = apply_rules(module.funcs["f"], [only_single_use], "p")
    assert stats.hits["only-single-use"] == 1 and stats.erased == 2
    assert body(module)[0] == "%n = t.silu(%x) : f32[N, 8]"  # takes the name it replaces


@rule(Silu)
def silu_of_single_use(op: Silu, rw: Rewriter) -> bool:
    if op.x.op is None or not op.x.has_one_use:
        return False
    rw.replace(op, rw.create(Neg, op.x))
    return True


def test_the_last_user_is_looked_at_again() -> None:
    # %s is visited before %late is found dead; only then is %n's single use the one in %s.
    module = parse(
        """  %n = t.exp(%x) : f32[N, 8]
  %s = t.silu(%n) : f32[N, 8]
  %late = t.exp(%n) : f32[N, 8]
  return %s, %y
"""
    )
    stats = apply_rules(module.funcs["f"], [silu_of_single_use], "p")
    assert stats.hits["silu-of-single-use"] == 1 and stats.erased == 1
    verify(module)


def test_effects_keep_ops_alive() -> None:
    module = Module()
    module.groups["tp"] = RankGroup(1)
    func = module.add_func("f")
    from xllm_compiler.ir.types import Tensor

    x = func.add_arg("x", Tensor("f32", [4]))
    b = Builder.at_end(func)
    n = b.create(Neg, x)
    future = b.create(AllReduceStart, n.result, group="tp")
    b.create(Wait, future.result)
    b.create(Neg, x)
    func.set_returns([])
    assert erase_dead(func) == 1 and len(func.ops) == 3


def test_liars_and_loops_are_caught() -> None:
    @rule(Neg)
    def says_no(op: Neg, rw: Rewriter) -> bool:
        rw.replace(op, op.x)
        return False

    @rule(Neg)
    def says_yes(op: Neg, rw: Rewriter) -> bool:
        return True

    @rule(Neg)
    def to_silu(op: Neg, rw: Rewriter) -> bool:
        rw.replace(op, rw.create(Silu, op.x))
        return True

    @rule(Silu)
    def to_neg(op: Silu, rw: Rewriter) -> bool:
        rw.replace(op, rw.create(Neg, op.x))
        return True

    text = "  %n = t.neg(%x) : f32[N, 8]\n  return %n, %y\n"
    for rules, message in (([says_no], "returned False"), ([says_yes], "changed nothing"), ([to_silu, to_neg], "undo")):
        with pytest.raises(XllmError, match=message) as e:
            apply_rules(parse(text).funcs["f"], rules, "p")
        assert e.value.kind == "internal" and "test_ir_rewrite.py" in e.value.where


def test_replacing_by_another_type_is_refused() -> None:
    @rule(Neg)
    def wrong(op: Neg, rw: Rewriter) -> bool:
        rw.replace(op, op.func.arg("w"))
        return True

    with pytest.raises(XllmError, match=r"is f32\[N, 8\]; %w is f32\[8\]"):
        apply_rules(parse("  %n = t.neg(%x) : f32[N, 8]\n  return %n, %y\n").funcs["f"], [wrong], "p")


def test_a_context_gets_counts_and_decides_about_single_rewrites() -> None:
    class Context:
        def __init__(self) -> None:
            self.counts: dict[str, int] = {}
            self.tries: list[tuple[str, str, bool, list[str]]] = []

        def stat(self, name: str, n: int = 1) -> None:
            self.counts[name] = self.counts.get(name, 0) + n

        def remark(self, op: Op | None, text: str) -> None:
            raise AssertionError(text)

        def allows(self, rule: str, op: Op) -> bool:
            return op.results[0].name != "c"

        def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op] = ()) -> None:
            self.tries.append((rule, op.results[0].name, fired, [o.name for o in made]))

    ctx = Context()
    text = "  %a = t.neg(%x) : f32[N, 8]\n  %b = t.neg(%a) : f32[N, 8]\n  %c = t.neg(%a) : f32[N, 8]\n  return %b, %c\n"
    module = parse(text)
    apply_rules(module.funcs["f"], [double_neg], "p", ctx)
    assert ctx.counts == {"double-neg": 1}
    assert [t for t in ctx.tries if t[2]] == [("p/double-neg", "b", True, [])]
    assert ("p/double-neg", "a", False, []) in ctx.tries and all(name != "c" for _, name, _, _ in ctx.tries)
    assert [op.results[0].name for op in module.funcs["f"].ops] == ["a", "c"]


def test_a_rule_that_forgets_to_say_what_it_did_is_told() -> None:
    @rule(Neg)
    def silent(op: Neg, rw: Rewriter) -> bool:
        rw.replace(op, op.x)
        return None  # type: ignore[return-value]

    with pytest.raises(XllmError, match="rule silent changed the IR and returned None") as e:
        apply_rules(parse("  %n = t.neg(%x) : f32[N, 8]\n  return %n, %y\n").funcs["f"], [silent], "p")
    assert "return True after changing the IR" in e.value.help
