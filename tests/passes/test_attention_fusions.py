"""fuse-qkv and fuse-kv-append one after the other, in the shapes that real models have. Single situations, near misses
and remarks are in the folders beside."""

from __future__ import annotations

import pytest

from xllm_compiler.testing.xir import Case

H, K, D = 4, 2, 8  # query heads, kv heads, head size
ATTENTION = """
  %kv1 = kv.write(%kv, %kf, %vh, %pos, %seq, %table) : KV
  %a = kv.attend(%kv1, %qf, %pos, %seq, %start, %table, scale=0.35) : DT[N, 4, 8]
  %y = t.reshape(%a, shape=[N, 32]) : DT[N, 32]
  return %y, %kv1
"""
SEPARATE = """
  %wq = param(name="wq") : DT[32, 16]
  %wk = param(name="wk") : DT[16, 16]
  %wv = param(name="wv") : DT[16, 16]
  %q = nn.linear(%x, %wq) : DT[N, 32]
  %k = nn.linear(%x, %wk) : DT[N, 16]
  %v = nn.linear(%x, %wv) : DT[N, 16]
"""
HEADS = """
  %qh = t.reshape(%q, shape=[N, 4, 8]) : DT[N, 4, 8]
  %kh = t.reshape(%k, shape=[N, 2, 8]) : DT[N, 2, 8]
  %vh = t.reshape(%v, shape=[N, 2, 8]) : DT[N, 2, 8]
"""
FUSED = """
  %w = param(name="w") : DT[64, 16]
  %qkv = nn.linear(%x, %w) : DT[N, 64]
  %q = t.slice(%qkv, axis=1, start=0, stop=32) : DT[N, 32]
  %k = t.slice(%qkv, axis=1, start=32, stop=48) : DT[N, 16]
  %v = t.slice(%qkv, axis=1, start=48, stop=64) : DT[N, 16]
"""
NORM = """
  %qn = param(name="qn") : DT[8]
  %kn = param(name="kn") : DT[8]
  %qm = nn.rms_norm(%qh, w=%qn, eps=1e-06) : DT[N, 4, 8]
  %km = nn.rms_norm(%kh, w=%kn, eps=1e-06) : DT[N, 2, 8]
"""


def rope(q: str = "qh", k: str = "kh", rotated: int = 8, style: str = "half") -> str:
    return f"""
  %cos_t = param(name="cos") : f32[64, {rotated // 2}]
  %sin_t = param(name="sin") : f32[64, {rotated // 2}]
  %cos = nn.embedding(%pos, %cos_t) : f32[N, {rotated // 2}]
  %sin = nn.embedding(%pos, %sin_t) : f32[N, {rotated // 2}]
  %qf = nn.rope(%{q}, %cos, %sin, style={style}) : DT[N, 4, 8]
  %kf = nn.rope(%{k}, %cos, %sin, style={style}) : DT[N, 2, 8]
"""


def attention(*parts: str, dtype: str = "f32", names: tuple[str, str] | None = None) -> Case:
    body = "".join(parts)
    if names is not None:  # what attention reads when nothing else is called %qf and %kf
        body = body.replace("%qf,", f"%{names[0]},").replace("%kf,", f"%{names[1]},")
    kv = "kv<DT, heads=2, k=8, v=8, page=16>[P]"
    args = "%x: DT[N, 16], %pos: i32[N], %seq: i32[N], %start: i32[B + 1], %table: i32[B, 4]"
    text = f"""xir 1 stage=graph
dim N in [1, 64]
dim B in [1, 16]
dim P in [1, 64]
assume N - B >= 0

func @step({args}, %kv: {kv}) -> (DT[N, 32], {kv} alias %kv) {{
{body}}}
"""
    text = "\n".join(line for line in text.splitlines() if line.strip() or not line)
    return Case.parse(text.replace("KV", kv).replace("DT", dtype))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_qkv_then_append_with_norm_and_rope(dtype: str) -> None:
    case = attention(SEPARATE, HEADS, NORM, rope("qm", "km"), ATTENTION, dtype=dtype).run("fuse-qkv")
    assert case.op_names().count("nn.linear") == 1 and case.op_names().count("t.slice") == 3
    assert "t.concat(%wq, %wk, %wv, axis=0) : " in case.text
    case.check_same()
    case.run("fuse-kv-append,dce")
    left = ["t.concat", "nn.linear", "nn.embedding", "nn.embedding", "kv.append", "kv.attend", "t.reshape"]
    assert case.op_names() == left
    assert "qw=%qn, kw=%kn, q_heads=4, eps=1e-06)" in case.text
    case.check_same()


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_append_without_norm_and_with_partial_rotary(rotated: int, style: str) -> None:
    case = attention(FUSED, HEADS, rope(rotated=rotated, style=style), ATTENTION).run("fuse-kv-append,dce")
    assert "t.slice" not in case.op_names() and "kv.append" in case.op_names()
    assert "qw=" not in case.text and ("style=interleaved" in case.text) == (style == "interleaved")
    case.check_same()


def test_append_of_a_projection_split_by_heads() -> None:
    """[N, heads, dim] first, then slices over the heads: the same columns."""
    split = """
  %w = param(name="w") : DT[64, 16]
  %qkv = nn.linear(%x, %w) : DT[N, 64]
  %all = t.reshape(%qkv, shape=[N, 8, 8]) : DT[N, 8, 8]
  %qh = t.slice(%all, axis=1, start=0, stop=4) : DT[N, 4, 8]
  %kh = t.slice(%all, axis=1, start=4, stop=6) : DT[N, 2, 8]
  %vh = t.slice(%all, axis=1, start=6, stop=8) : DT[N, 2, 8]
"""
    case = attention(split, rope(), ATTENTION).run("fuse-qkv")
    assert not case.changed
    case.run("fuse-kv-append,dce")
    assert "kv.append" in case.op_names()
    case.check_same()


@pytest.mark.parametrize("bias", [False, True])
def test_qkv_of_a_projection_grouped_by_kv_head(bias: bool) -> None:
    """Falcon's order: for every kv head its query heads, then its key, then its value."""
    grouped = f"""
  %w = param(name="w") : DT[64, 16]
  %b = param(name="b") : DT[64]
  %qkv = nn.linear(%x, %w{", bias=%b" if bias else ""}) : DT[N, 64]
  %all = t.reshape(%qkv, shape=[N, 2, 4, 8]) : DT[N, 2, 4, 8]
  %q4 = t.slice(%all, axis=2, start=0, stop=2) : DT[N, 2, 2, 8]
  %k4 = t.slice(%all, axis=2, start=2, stop=3) : DT[N, 2, 1, 8]
  %v4 = t.slice(%all, axis=2, start=3, stop=4) : DT[N, 2, 1, 8]
  %qh = t.reshape(%q4, shape=[N, 4, 8]) : DT[N, 4, 8]
  %kh = t.reshape(%k4, shape=[N, 2, 8]) : DT[N, 2, 8]
  %vh = t.reshape(%v4, shape=[N, 2, 8]) : DT[N, 2, 8]
"""
    case = attention(grouped, rope(), ATTENTION).run("fuse-qkv,fuse-kv-append,fold,cse,dce")
    names = case.op_names()
    assert "kv.append" in names and names.count("nn.linear") == 1
    step_ops = names[names.index("nn.linear") :]
    assert "t.slice" not in step_ops, "the slicing has moved to the weight"
    case.check_same()


def test_qkv_with_a_transpose_in_the_way() -> None:
    turned = """
  %w = param(name="w") : DT[64, 16]
  %qkv = nn.linear(%x, %w) : DT[N, 64]
  %all = t.reshape(%qkv, shape=[N, 8, 8]) : DT[N, 8, 8]
  %t = t.transpose(%all, perm=[0, 2, 1]) : DT[N, 8, 8]
  %qh = t.slice(%t, axis=1, start=4, stop=8) : DT[N, 4, 8]
  %kh = t.slice(%t, axis=1, start=0, stop=2) : DT[N, 2, 8]
  %vh = t.slice(%t, axis=1, start=2, stop=4) : DT[N, 2, 8]
"""
    case = attention(turned, rope(), ATTENTION).run("fuse-qkv,fuse-kv-append,dce")
    assert "kv.append" in case.op_names()
    case.check_same()


def test_qkv_with_biases_and_weights_defined_late() -> None:
    late = """
  %wq = param(name="wq") : DT[32, 16]
  %bq = param(name="bq") : DT[32]
  %q = nn.linear(%x, %wq, bias=%bq) : DT[N, 32]
  %qh = t.reshape(%q, shape=[N, 4, 8]) : DT[N, 4, 8]
  %wk = param(name="wk") : DT[16, 16]
  %bk = param(name="bk") : DT[16]
  %k = nn.linear(%x, %wk, bias=%bk) : DT[N, 16]
  %kh = t.reshape(%k, shape=[N, 2, 8]) : DT[N, 2, 8]
  %wv = param(name="wv") : DT[16, 16]
  %bv = param(name="bv") : DT[16]
  %v = nn.linear(%x, %wv, bias=%bv) : DT[N, 16]
  %vh = t.reshape(%v, shape=[N, 2, 8]) : DT[N, 2, 8]
"""
    case = attention(late, rope(), ATTENTION).run("fuse-qkv,fuse-kv-append,dce")
    assert case.op_names().count("t.concat") == 2 and "kv.append" in case.op_names()
    case.check_same()
