"""canonicalise: every spelling of a norm, rotation or activation becomes the op, and means the same."""

from __future__ import annotations

import math

import pytest

from xllm_compiler.testing.xir import Case

HEAD = "xir 1 stage=graph\ndim N in [1, 64]\ndim B in [1, 8]\ndim S in [0, 8]\ndim P in [1, 256]\nassume N - B >= 0\n"


def func(body: str, returns: str = "f32[N, 8]", args: str = "%x: f32[N, 8]") -> Case:
    return Case.parse(f"{HEAD}\nfunc @f({args}) -> ({returns}) {{\n{body}\n}}\n")


SQUARES = {
    "pow": "%two = t.const(value=2.0) : f32[]\n  %p = t.pow(%x, %two) : f32[N, 8]",
    "mul": "%p = t.mul(%x, %x) : f32[N, 8]",
}
ROOTS = {
    "rsqrt": "%r = t.rsqrt(%a) : f32[N, 1]\n  %n = t.mul(%x, %r) : f32[N, 8]",
    "rsqrt-first": "%r = t.rsqrt(%a) : f32[N, 1]\n  %n = t.mul(%r, %x) : f32[N, 8]",
    "div": "%r = t.sqrt(%a) : f32[N, 1]\n  %n = t.div(%x, %r) : f32[N, 8]",
    "one-over": "%o = t.const(value=1.0) : f32[]\n  %q = t.sqrt(%a) : f32[N, 1]\n  %r = t.div(%o, %q) : f32[N, 1]\n"
    "  %n = t.mul(%x, %r) : f32[N, 8]",
    "pow": "%h = t.const(value=-0.5) : f32[]\n  %r = t.pow(%a, %h) : f32[N, 1]\n  %n = t.mul(%x, %r) : f32[N, 8]",
}
WEIGHTS = {
    "none": "%y = t.neg(%n) : f32[N, 8]",
    "after": '%w = param(name="w") : f32[8]\n  %y = t.mul(%n, %w) : f32[N, 8]',
    "before": '%w = param(name="w") : f32[8]\n  %y = t.mul(%w, %n) : f32[N, 8]',
    "one-plus": '%w = param(name="w") : f32[8]\n  %i = t.const(value=1.0) : f32[]\n  %w1 = t.add(%i, %w) : f32[8]\n'
    "  %y = t.mul(%n, %w1) : f32[N, 8]",
}


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_rms_norm(square: str, root: str, weight: str) -> None:
    case = func(
        f"""  {SQUARES[square]}
  %m = t.reduce(%p, kind=mean, axes=[1], keep=true) : f32[N, 1]
  %e = t.const(value=1e-05) : f32[]
  %a = t.add(%m, %e) : f32[N, 1]
  {ROOTS[root]}
  {WEIGHTS[weight]}
  return %y"""
    ).run("canonicalise")
    assert case.op_names() == (["nn.rms_norm", "t.neg"] if weight == "none" else ["nn.rms_norm"])
    assert ("offset=1.0" in case.text) == (weight == "one-plus")
    case.check_same()


def rotation(style: str, table: str, x: str = "%x", n: str = "", width: int = 8) -> str:
    """x cos + rotate(x) sin over `width` elements, with tables of that width made from %f [N, width / 2]."""
    half = width // 2
    double = {
        "concat": f"%d{n} = t.concat(%f, %f, axis=1) : f32[N, {width}]",
        "stack": f"%f1{n} = t.reshape(%f, shape=[N, {half}, 1]) : f32[N, {half}, 1]\n"
        f"  %f2{n} = t.concat(%f1{n}, %f1{n}, axis=2) : f32[N, {half}, 2]\n"
        f"  %d{n} = t.reshape(%f2{n}, shape=[N, {width}]) : f32[N, {width}]",
        "repeat": f"%f1{n} = t.reshape(%f, shape=[N, {half}, 1]) : f32[N, {half}, 1]\n"
        f"  %f2{n} = t.expand(%f1{n}, shape=[N, {half}, 2]) : f32[N, {half}, 2]\n"
        f"  %d{n} = t.reshape(%f2{n}, shape=[N, {width}]) : f32[N, {width}]",
    }[table]
    parts = {
        "half": f"%a{n} = t.slice({x}, axis=2, start=0, stop={half}) : f32[N, 2, {half}]\n"
        f"  %b{n} = t.slice({x}, axis=2, start={half}, stop={width}) : f32[N, 2, {half}]\n"
        f"  %m{n} = t.neg(%b{n}) : f32[N, 2, {half}]\n"
        f"  %rot{n} = t.concat(%m{n}, %a{n}, axis=2) : f32[N, 2, {width}]",
        "interleaved": f"%a{n} = t.slice({x}, axis=2, start=0, stop={width}, step=2) : f32[N, 2, {half}]\n"
        f"  %b{n} = t.slice({x}, axis=2, start=1, stop={width}, step=2) : f32[N, 2, {half}]\n"
        f"  %m{n} = t.neg(%b{n}) : f32[N, 2, {half}]\n"
        f"  %m1{n} = t.reshape(%m{n}, shape=[N, 2, {half}, 1]) : f32[N, 2, {half}, 1]\n"
        f"  %a1{n} = t.reshape(%a{n}, shape=[N, 2, {half}, 1]) : f32[N, 2, {half}, 1]\n"
        f"  %s{n} = t.concat(%m1{n}, %a1{n}, axis=3) : f32[N, 2, {half}, 2]\n"
        f"  %rot{n} = t.reshape(%s{n}, shape=[N, 2, {width}]) : f32[N, 2, {width}]",
    }[style]
    return f"""  {double}
  %cos{n} = t.cos(%d{n}) : f32[N, {width}]
  %c{n} = t.reshape(%cos{n}, shape=[N, 1, {width}]) : f32[N, 1, {width}]
  %sin{n} = t.sin(%d{n}) : f32[N, {width}]
  %sn{n} = t.reshape(%sin{n}, shape=[N, 1, {width}]) : f32[N, 1, {width}]
  %l{n} = t.mul({x}, %c{n}) : f32[N, 2, {width}]
  {parts}
  %r{n} = t.mul(%rot{n}, %sn{n}) : f32[N, 2, {width}]
  %y{n} = t.add(%l{n}, %r{n}) : f32[N, 2, {width}]
"""


ROPE_ARGS = "%x: f32[N, 2, 8], %f: f32[N, 4]"


@pytest.mark.parametrize(("style", "table"), [("half", "concat"), ("interleaved", "stack"), ("interleaved", "repeat")])
def test_rope(style: str, table: str) -> None:
    case = func(rotation(style, table) + "  return %y", "f32[N, 2, 8]", ROPE_ARGS).run("canonicalise")
    assert case.op_names() == ["t.cos", "t.sin", "nn.rope"]
    assert ("style=interleaved" in case.text) == (style == "interleaved")
    case.check_same()


@pytest.mark.parametrize(("style", "table"), [("half", "repeat"), ("half", "stack"), ("interleaved", "concat")])
def test_a_table_that_is_doubled_the_other_way_is_no_rope(style: str, table: str) -> None:
    case = func(rotation(style, table) + "  return %y", "f32[N, 2, 8]", ROPE_ARGS).run("canonicalise")
    assert "nn.rope" not in case.op_names()
    case.check_same()


def test_partial_rope_inside_a_fused_projection() -> None:
    body = (
        "  %q = t.slice(%h, axis=2, start=4, stop=8) : f32[N, 2, 4]\n"
        "  %rest = t.slice(%h, axis=2, start=8, stop=12) : f32[N, 2, 4]\n"
        + rotation("half", "concat", "%q", width=4)
        + "  %o = t.concat(%y, %rest, axis=2) : f32[N, 2, 8]\n  return %o"
    )
    case = func(body, "f32[N, 2, 8]", "%h: f32[N, 2, 24], %f: f32[N, 2]").run("fold,canonicalise,fold")
    assert case.op_names() == ["t.slice", "t.cos", "t.sin", "nn.rope"] or "nn.rope" in case.op_names()
    assert "t.concat" not in case.op_names()
    case.check_same()


@pytest.mark.parametrize("stacked", [False, True])
def test_rope_spelled_by_parts(stacked: bool) -> None:
    """gpt-oss: (a cos - b sin) and (b cos + a sin) joined, tables of half width."""
    step = ", step=2" if stacked else ""
    starts = (0, 1) if stacked else (0, 4)
    stops = (8, 8) if stacked else (4, 8)
    join = (
        "%o1 = t.reshape(%o, shape=[N, 2, 4, 1]) : f32[N, 2, 4, 1]\n  %p1 = t.reshape(%p, shape=[N, 2, 4, 1]) : "
        "f32[N, 2, 4, 1]\n  %j = t.concat(%o1, %p1, axis=3) : f32[N, 2, 4, 2]\n  %y = t.reshape(%j, shape=[N, 2, 8]) : "
        "f32[N, 2, 8]"
        if stacked
        else "%y = t.concat(%o, %p, axis=2) : f32[N, 2, 8]"
    )
    case = func(
        f"""  %a = t.slice(%x, axis=2, start={starts[0]}, stop={stops[0]}{step}) : f32[N, 2, 4]
  %b = t.slice(%x, axis=2, start={starts[1]}, stop={stops[1]}{step}) : f32[N, 2, 4]
  %cos = t.cos(%f) : f32[N, 4]
  %c = t.reshape(%cos, shape=[N, 1, 4]) : f32[N, 1, 4]
  %sin = t.sin(%f) : f32[N, 4]
  %s = t.reshape(%sin, shape=[N, 1, 4]) : f32[N, 1, 4]
  %ac = t.mul(%a, %c) : f32[N, 2, 4]
  %bs = t.mul(%b, %s) : f32[N, 2, 4]
  %o = t.sub(%ac, %bs) : f32[N, 2, 4]
  %bc = t.mul(%b, %c) : f32[N, 2, 4]
  %as = t.mul(%a, %s) : f32[N, 2, 4]
  %p = t.add(%bc, %as) : f32[N, 2, 4]
  {join}
  return %y""",
        "f32[N, 2, 8]",
        ROPE_ARGS,
    ).run("canonicalise")
    assert case.op_names() == ["t.cos", "t.sin", "nn.rope"]
    case.check_same()


def test_rope_keeps_f32_tables_between_bf16_heads() -> None:
    body = rotation("half", "concat", "%xf").replace("%cos = t.cos(%d)", "%cosw = t.cos(%d)")
    body = body.replace(
        "  %c = t.reshape(%cos, ",
        "  %cosb = t.cast(%cosw, dtype=bf16) : bf16[N, 8]\n  %cos = t.cast(%cosb, dtype=f32) : f32[N, 8]\n"
        "  %c = t.reshape(%cos, ",
    )
    case = func(
        "  %xf = t.cast(%x, dtype=f32) : f32[N, 2, 8]\n"
        + body
        + "  %z = t.cast(%y, dtype=bf16) : bf16[N, 2, 8]\n  return %z",
        "bf16[N, 2, 8]",
        "%x: bf16[N, 2, 8], %f: f32[N, 4]",
    ).run("canonicalise")
    assert case.op_names() == ["t.cos", "t.sin", "nn.rope"] and "dtype=bf16" not in case.text


def test_rope_whose_turn_is_widened_apart() -> None:
    """Olmo 2: 16-bit heads times f32 tables, x and its turned copy widened one by one."""
    case = func(
        """  %d = t.concat(%f, %f, axis=1) : f32[N, 8]
  %cos = t.cos(%d) : f32[N, 8]
  %c = t.reshape(%cos, shape=[N, 1, 8]) : f32[N, 1, 8]
  %sin = t.sin(%d) : f32[N, 8]
  %s = t.reshape(%sin, shape=[N, 1, 8]) : f32[N, 1, 8]
  %xf = t.cast(%x, dtype=f32) : f32[N, 2, 8]
  %l = t.mul(%xf, %c) : f32[N, 2, 8]
  %a = t.slice(%x, axis=2, start=0, stop=4) : bf16[N, 2, 4]
  %b = t.slice(%x, axis=2, start=4, stop=8) : bf16[N, 2, 4]
  %m = t.neg(%b) : bf16[N, 2, 4]
  %rot = t.concat(%m, %a, axis=2) : bf16[N, 2, 8]
  %rf = t.cast(%rot, dtype=f32) : f32[N, 2, 8]
  %r = t.mul(%rf, %s) : f32[N, 2, 8]
  %y = t.add(%l, %r) : f32[N, 2, 8]
  %z = t.cast(%y, dtype=bf16) : bf16[N, 2, 8]
  return %z""",
        "bf16[N, 2, 8]",
        "%x: bf16[N, 2, 8], %f: f32[N, 4]",
    ).run("canonicalise")
    assert case.op_names() == ["t.cos", "t.sin", "nn.rope"]
    case.check_same()


def test_half_of_a_rounded_table_is_not_rounded() -> None:
    """GLM: the rounded table is cut in half and every value of the half used twice."""
    body = rotation("interleaved", "repeat").replace("%f1 = t.reshape(%f,", "%f1 = t.reshape(%fh,")
    case = func(
        "  %g = t.concat(%f, %f, axis=1) : f32[N, 8]\n  %gb = t.cast(%g, dtype=bf16) : bf16[N, 8]\n"
        "  %fb = t.slice(%gb, axis=1, start=0, stop=4) : bf16[N, 4]\n  %fh = t.cast(%fb, dtype=f32) : f32[N, 4]\n"
        + body
        + "  return %y",
        "f32[N, 2, 8]",
        ROPE_ARGS,
    ).run("canonicalise,fold,dce")
    assert case.op_names() == ["t.cos", "t.sin", "nn.rope"] and "bf16" not in case.text


TANH = f"""  %k = t.const(value={math.sqrt(2 / math.pi)}) : f32[]
  %q = t.const(value=0.044715) : f32[]
  %one = t.const(value=1.0) : f32[]
  %half = t.const(value=0.5) : f32[]
"""
GELUS = {
    "new": """  %three = t.const(value=3.0) : f32[]
  %p = t.pow(%x, %three) : f32[N, 8]
  %c = t.mul(%q, %p) : f32[N, 8]
  %s = t.add(%x, %c) : f32[N, 8]
  %i = t.mul(%k, %s) : f32[N, 8]
  %t = t.tanh(%i) : f32[N, 8]
  %o = t.add(%one, %t) : f32[N, 8]
  %h = t.mul(%half, %x) : f32[N, 8]
  %y = t.mul(%h, %o) : f32[N, 8]
""",
    "fast": """  %kx = t.mul(%x, %k) : f32[N, 8]
  %qx = t.mul(%q, %x) : f32[N, 8]
  %qxx = t.mul(%qx, %x) : f32[N, 8]
  %s = t.add(%one, %qxx) : f32[N, 8]
  %kxs = t.mul(%x, %s) : f32[N, 8]
  %i = t.mul(%kxs, %k) : f32[N, 8]
  %t = t.tanh(%i) : f32[N, 8]
  %o = t.add(%t, %one) : f32[N, 8]
  %xo = t.mul(%x, %o) : f32[N, 8]
  %y = t.mul(%half, %xo) : f32[N, 8]
""",
    "erf": f"""  %r = t.const(value={math.sqrt(2)}) : f32[]
  %d = t.div(%x, %r) : f32[N, 8]
  %t = t.erf(%d) : f32[N, 8]
  %o = t.add(%t, %one) : f32[N, 8]
  %h = t.mul(%x, %half) : f32[N, 8]
  %y = t.mul(%h, %o) : f32[N, 8]
""",
}


@pytest.mark.parametrize("kind", GELUS)
def test_gelu(kind: str) -> None:
    case = func(TANH + GELUS[kind] + "  return %y").run("canonicalise")
    assert case.op_names() == ["t.gelu"] and ("tanh=true" in case.text) == (kind != "erf")
    case.check_same()


def test_silu_and_quick_gelu() -> None:
    case = func(
        """  %s = t.sigmoid(%x) : f32[N, 8]
  %a = t.mul(%s, %x) : f32[N, 8]
  %k = t.const(value=1.702) : f32[]
  %kx = t.mul(%x, %k) : f32[N, 8]
  %t = t.sigmoid(%kx) : f32[N, 8]
  %b = t.mul(%x, %t) : f32[N, 8]
  %y = t.add(%a, %b) : f32[N, 8]
  return %y"""
    ).run("canonicalise")
    assert sorted(case.op_names()) == ["t.add", "t.mul", "t.mul", "t.sigmoid", "t.silu"]
    case.check_same()


KV_ARGS = (
    "%k: f32[N, 2, 8], %v: f32[N, 2, 8], %q: f32[N, 8, 8], %pos: i32[N], %seq: i32[N], %start: i32[B + 1], "
    "%table: i32[B, 4], %kv0: kv<f32, heads=8, k=8, v=8, page=16>[P]"
)


def repeat(name: str, order: str = "[N, 2, 1, 8]", wide: str = "[N, 2, 4, 8]") -> str:
    return f"""  %{name}1 = t.reshape(%{name}, shape={order}) : f32{order}
  %{name}2 = t.expand(%{name}1, shape={wide}) : f32{wide}
  %{name}3 = t.reshape(%{name}2, shape=[N, 8, 8]) : f32[N, 8, 8]
"""


ATTEND = """  %w = kv.write(%kv0, %k3, %v3, %pos, %seq, %table) : kv<f32, heads=8, k=8, v=8, page=16>[P]
  %y = kv.attend(%w, %q, %pos, %seq, %start, %table, scale=0.5) : f32[N, 8, 8]
  return %y, %w"""
KV_RETURNS = "f32[N, 8, 8], kv<f32, heads=8, k=8, v=8, page=16>[P] alias %kv0"


def test_repeated_heads_leave_the_cache() -> None:
    case = func(repeat("k") + repeat("v") + ATTEND, KV_RETURNS, KV_ARGS).run("canonicalise,fold")
    assert case.op_names() == ["kv.write", "kv.attend"]
    assert "%kv0: kv<f32, heads=2, k=8, v=8, page=16>[P]" in case.text and "heads=8" not in case.text
    # Same attention: all of the context is in this step, so that the caches' old contents do not matter.
    import numpy as np

    from xllm_compiler.interp import run
    from xllm_compiler.ir.semantics import state_zeros

    rng = np.random.default_rng(0)
    inputs = {k: rng.standard_normal((5, h, 8)).astype(np.float32) for k, h in (("k", 2), ("v", 2), ("q", 8))}
    inputs |= {"pos": np.arange(5, dtype=np.int32), "seq": np.zeros(5, np.int32), "start": np.array([0, 5], np.int32)}
    inputs |= {"table": np.array([[2, 0, 1, 3]], np.int32)}
    results = [
        run(m, "f", {**inputs, "kv0": state_zeros(m.func("f").arg("kv0").kv, {"P": 4})}, {}, {"P": 4})[0]
        for m in (case.before, case.after)
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        repeat("k") + "  %v3 = t.concat(%v, %v, %v, %v, axis=1) : f32[N, 8, 8]\n",  # values tiled, not repeated
        repeat("k", "[N, 1, 2, 8]", "[N, 4, 2, 8]") + repeat("v", "[N, 1, 2, 8]", "[N, 4, 2, 8]"),  # heads in turns
    ],
)
def test_heads_repeated_otherwise_stay(body: str) -> None:
    case = func(body + ATTEND, KV_RETURNS, KV_ARGS).run("canonicalise")
    assert "%kv0: kv<f32, heads=8" in case.text


def test_small_powers_are_products() -> None:
    case = func(
        """  %c3 = t.const(value=3.0) : f32[]
  %a = t.pow(%x, %c3) : f32[N, 8]
  %c2 = t.const(value=2.0) : f32[]
  %y = t.pow(%a, %c2) : f32[N, 8]
  return %y"""
    ).run("canonicalise")
    assert case.op_names() == ["t.mul"] * 3
    case.check_same()
