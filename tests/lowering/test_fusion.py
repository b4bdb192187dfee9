"""Fusion under a memory plan that knows nothing of it: random modules, compiled, against the interpreter."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from xllm_compiler.ir.parser import parse_module
from xllm_compiler.lowering.fuse import Fusion
from xllm_compiler.lowering.storage import Storage
from xllm_compiler.passes.manager import run_pipeline

HEAD = """xir 1 stage=graph
dim N in [1, 512]  // "tokens"
dim B in [1, 64]  // "requests"
dim S in [0, 64]  // "rows"
dim P in [1, 64]  // "pages"
"""
WIDTH = 24


def _random_step(seed: int, t: str) -> str:
    """A step of some 25 random ops on [N, 24] and [N, 1] values, reshapes and rows shuffled in between."""
    rng = np.random.default_rng(seed)
    wide, thin = ["%x", "%z"], ["%m"]
    lines = [
        f'  %w = param(name="w") : {t}[8, {WIDTH}]',
        f'  %u = param(name="u") : {t}[{WIDTH}]',
        f"  %x = t.take(%w, %ids, axis=0) : {t}[N, {WIDTH}]",
        f"  %z = t.take(%w, %pos, axis=0) : {t}[N, {WIDTH}]",
        f"  %m = t.reduce(%x, kind=mean, axes=[1], keep=true) : {t}[N, 1]",
        "  %half = t.const(value=0.5) : f32[]",
    ]
    for i in range(25):
        v = f"%v{i}"
        a = wide[-1 - int(rng.integers(0, min(4, len(wide))))]
        b = wide[int(rng.integers(0, len(wide)))]
        s = thin[int(rng.integers(0, len(thin)))]
        kind = rng.choice(["pair", "pair", "one", "one", "thin", "vector", "reduce", "concat", "turn", "view", "const"])
        ty = f"{t}[N, {WIDTH}]"
        if kind == "pair":
            op = rng.choice(["add", "sub", "mul", "max", "min"])
            lines.append(f"  {v} = t.{op}({a}, {b}) : {ty}")
        elif kind == "one":
            op = rng.choice(["tanh", "sigmoid", "neg", "abs", "relu", "exp"])
            lines.append(f"  {v}c = t.clamp({a}, lo=-2.0, hi=2.0) : {ty}")
            lines.append(f"  {v} = t.{op}({v}c) : {ty}")
        elif kind == "thin":
            lines.append(f"  {v} = t.mul({a}, {s}) : {ty}")
        elif kind == "vector":
            lines.append(f"  {v} = t.add({a}, %u) : {ty}")
        elif kind == "const":
            lines.append(f"  {v} = t.mul({a}, %half) : {ty}")
        elif kind == "reduce":
            lines.append(f"  {v}r = t.reduce({a}, kind=mean, axes=[1], keep=true) : {t}[N, 1]")
            lines.append(f"  {v}s = t.sigmoid({v}r) : {t}[N, 1]")
            thin.append(f"{v}s")
            continue
        elif kind == "concat":
            lines.append(f"  {v}a = t.slice({a}, axis=1, start=0, stop=10) : {t}[N, 10]")
            lines.append(f"  {v}b = t.slice({b}, axis=1, start=10, stop={WIDTH}) : {t}[N, {WIDTH - 10}]")
            lines.append(f"  {v} = t.concat({v}b, {v}a, axis=1) : {ty}")
        elif kind == "turn":
            lines.append(f"  {v}a = t.reshape({a}, shape=[N, 4, 6]) : {t}[N, 4, 6]")
            lines.append(f"  {v}b = t.transpose({v}a, perm=[0, 2, 1]) : {t}[N, 6, 4]")
            lines.append(f"  {v} = t.reshape({v}b, shape=[N, {WIDTH}]) : {ty}")
        else:
            lines.append(f"  {v}a = t.reshape({a}, shape=[N, {WIDTH}, 1]) : {t}[N, {WIDTH}, 1]")
            lines.append(f"  {v} = t.reshape({v}a, shape=[N, {WIDTH}]) : {ty}")
        wide.append(v)
    lines.append(f"  %l0 = t.add({wide[-1]}, {wide[-2]}) : {t}[N, {WIDTH}]")
    lines.append(f"  %l1 = t.mul(%l0, {thin[-1]}) : {t}[N, {WIDTH}]")
    lines.append(f"  %out = t.cast(%l1, dtype=f32) : f32[N, {WIDTH}]")
    body = "\n".join(lines)
    return f"{HEAD}func @step(%ids: i32[N], %pos: i32[N]) -> (f32[N, {WIDTH}]) {{\n{body}\n  return %out\n}}\n"


def _inputs(n: int) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    return {"ids": rng.integers(0, 8, n).astype(np.int32), "pos": (np.arange(n) % 8).astype(np.int32)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("t", ["f32", "bf16"])
def test_random_modules(build: Any, seed: int, t: str) -> None:
    rng = np.random.default_rng(100 + seed)
    dtype = np.float32 if t == "f32" else ml_dtypes.bfloat16
    params = {"w": rng.standard_normal((8, WIDTH)).astype(dtype), "u": rng.standard_normal(WIDTH).astype(dtype)}
    c = build(_random_step(seed, t), params)
    for n, team in ((1, 1), (13, 2)):
        inputs = _inputs(n)
        got, _ = c.step(inputs, {"N": n}, c.lowering.isas[0], team)
        exact = c.reference(inputs, {"N": n}, precise=True)
        want = c.reference(inputs, {"N": n})
        if t == "f32":
            np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())
        else:  # fused chains round less often: never farther from the exact value than the interpreter, but for luck
            scale = np.abs(exact).max()
            assert np.abs(got - exact).max() <= 1.5 * np.abs(want - exact).max() + 0.02 * scale


def test_a_chain_becomes_one_kernel(build: Any) -> None:
    """Layer norm by hand with soft-capping: two reductions and one kernel for all the rest."""
    text = """func @step(%ids: i32[N], %pos: i32[N]) -> (f32[N, 64]) {
  %w = param(name="w") : f32[8, 64]
  %x = t.take(%w, %ids, axis=0) : f32[N, 64]
  %mu = t.reduce(%x, kind=mean, axes=[1], keep=true) : f32[N, 1]
  %d = t.sub(%x, %mu) : f32[N, 64]
  %q = t.mul(%d, %d) : f32[N, 64]
  %var = t.reduce(%q, kind=mean, axes=[1], keep=true) : f32[N, 1]
  %eps = t.const(value=1e-05) : f32[]
  %ve = t.add(%var, %eps) : f32[N, 1]
  %r = t.rsqrt(%ve) : f32[N, 1]
  %y = t.mul(%d, %r) : f32[N, 64]
  %cap = t.const(value=30.0) : f32[]
  %z = t.div(%y, %cap) : f32[N, 64]
  %t = t.tanh(%z) : f32[N, 64]
  %out = t.mul(%t, %cap) : f32[N, 64]
  return %out
}
"""
    params = {"w": np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)}
    c = build(text, params)
    # the gather, the mean, d (it has two readers of different kernels), the variance, the rest
    assert len(c.lowering.calls.programs["xllm_fn_step"].kernels) == 5
    got, _ = c.step(_inputs(9), {"N": 9}, c.lowering.isas[0], 2)
    np.testing.assert_allclose(got, c.reference(_inputs(9), {"N": 9}, precise=True), rtol=1e-5, atol=1e-5)


def test_a_late_reader_is_not_fused() -> None:
    """%a's bytes are given to %c before the kernel that would compute %b late: %b must be written in its place."""
    text = f"""{HEAD}func @step(%ids: i32[N]) -> (f32[N, 24]) {{
  %w = param(name="w") : f32[8, 24]
  %a = t.take(%w, %ids, axis=0, at=[0]) : f32[N, 24]
  %b = t.neg(%a, at=[96*N]) : f32[N, 24]
  %c = nn.rms_norm(%b, eps=1e-05, at=[0]) : f32[N, 24]
  %d = t.exp(%c, at=[192*N]) : f32[N, 24]
  %out = t.add(%b, %d) : f32[N, 24]
  return %out
}}
""".replace("stage=graph", "stage=buf").replace("(f32[N, 24]) {", "(f32[N, 24]) arena(288*N) {")
    module = parse_module(text)
    func = module.func("step")
    fusion = Fusion(Storage(func, module.scope))
    ops = {op.results[0].name: op for op in func.ops}
    assert not fusion.is_inlined(ops["b"])  # rms_norm reads it from memory
    assert fusion.is_inlined(ops["d"])
    late = parse_module(text.replace("%d = t.exp(%c, at=[192*N])", "%d = t.exp(%b, at=[192*N])"))
    func = late.func("step")
    assert Fusion(Storage(func, late.scope)).is_inlined({o.results[0].name: o for o in func.ops}["d"])


def test_pinning() -> None:
    """x is dead after its only reader, and its bytes are reused by another kernel before the group's root."""
    text = f"""{HEAD}func @step(%ids: i32[N]) -> (f32[N, 24]) {{
  %w = param(name="w") : f32[8, 24]
  %x = t.take(%w, %ids, axis=0) : f32[N, 24]
  %n = nn.rms_norm(%x, eps=1e-05) : f32[N, 24]
  %b = t.neg(%x) : f32[N, 24]
  %c = nn.rms_norm(%n, eps=1e-05) : f32[N, 24]
  %out = t.add(%b, %c) : f32[N, 24]
  return %out
}}
"""
    module = parse_module(text)
    run_pipeline("assign-streams,plan-memory", module)
    func = module.func("step")
    ops = {op.results[0].name: op for op in func.ops}
    storage = Storage(func, module.scope)
    reused = storage.overlap(storage.ref(ops["x"].result), storage.ref(ops["c"].result))
    assert reused, "the plan should reuse x's bytes for c; otherwise this test shows nothing"
    assert not Fusion(storage).is_inlined(ops["b"])
