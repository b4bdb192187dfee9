"""Live ranges and weight expressions."""

from xllm_compiler.analysis.liveness import Liveness, LiveRange, view_base, views_of
from xllm_compiler.analysis.weights import is_weight_expr, weight_exprs, weight_roots
from xllm_compiler.ir.parser import parse_module

TEXT = """xir 1 stage=graph
dim N in [1, 64]
func @f(%x: f32[N, 8], %unused: f32[N]) -> (f32[N, 16]) {
  %w1 = param(name="w1") : f32[4, 8]
  %w2 = param(name="w2") : f32[4, 8]
  %cat = t.concat(%w1, %w2, axis=0) : f32[8, 8]
  %i = t.iota(size=8, dtype=f32) : f32[8]
  %w = t.mul(%cat, %i) : f32[8, 8]
  %n = t.iota(size=N, dtype=f32) : f32[N]
  %c = t.const(value=2.0) : f32[]
  %wide = t.expand(%i, shape=[N, 8]) : f32[N, 8]
  %y = nn.linear(%x, %w) : f32[N, 8]
  %v = t.reshape(%y, shape=[8*N]) : f32[8*N]
  %v2 = t.reshape(%v, shape=[N, 8]) : f32[N, 8]
  %z = t.mul(%y, %c) : f32[N, 8]
  %dead = t.neg(%z) : f32[N, 8]
  %o = t.concat(%z, %v2, axis=1) : f32[N, 16]
  return %o
}
"""


def test_weight_expressions() -> None:
    func = parse_module(TEXT).funcs["f"]
    values = {r.name: r for op in func.ops for r in op.results}
    known = {v.name for v in weight_exprs(func)}
    assert known == {"w1", "w2", "cat", "i", "w", "c"}
    assert known == {name for name, v in values.items() if is_weight_expr(v)}
    assert not is_weight_expr(func.arg("x"))
    assert [v.name for v in weight_roots(func)] == ["i", "w", "c"]


def test_live_ranges() -> None:
    func = parse_module(TEXT).funcs["f"]
    values = {r.name: r for op in func.ops for r in op.results} | {a.name: a for a in func.args}
    live = Liveness(func)
    at = {op.results[0].name: i for i, op in enumerate(func.ops)}
    assert live.range(values["x"]) == LiveRange(-1, at["y"])
    assert live.range(values["unused"]) == LiveRange(-1, -1)
    assert live.range(values["dead"]) == LiveRange(at["dead"], at["dead"])
    assert live.range(values["o"]) == LiveRange(at["o"], len(func.ops))
    assert live.range(values["y"]) == LiveRange(at["y"], at["z"])
    assert [v.name for v in views_of(values["y"])] == ["v", "v2"] and view_base(values["v2"]) is values["y"]
    assert [v.name for v in live.live_at(func.ops[at["z"]])] == ["c", "y", "v2", "z"]
    assert live.range(values["y"]).overlaps(live.range(values["z"]))
    assert not live.range(values["w1"]).overlaps(live.range(values["y"]))
