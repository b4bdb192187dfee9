"""The .xir text form: it prints, it parses, and says where it does not."""

import pytest

from xllm_compiler.analysis.interface import interface_of
from xllm_compiler.ir import ops as _all  # noqa: F401
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Builder, Module
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.loc import Loc
from xllm_compiler.ir.ops import Clamp, Const, Linear, Neg, Param, Slice
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.types import Tensor
from xllm_compiler.ir.verify import verify
from xllm_compiler.step.interface import TensorSpec, ValueRange

SAMPLE = """xir 1 stage=graph
dim N in [1, 8192]  // tokens in this step
dim B in [1, 256]
dim M in [*, *] % 16
dim R in [0, 3]  // place in @dp
assume N - B >= 0  // every request has a token
assume N // 2 + 1 >= 0
group @tp size=8
group @dp size=4 stride=8 rank=R

func @step(
    %ids: i32[N],
    %pos: i32[N] in [0, 63],
    %seq: i32[N],
    %start: i32[B + 1],
    %table: i32[B, 4],
    %kv0: kv<bf16, heads=1, k=8, v=8, page=16>[M // 16]
) -> (rows: bf16[N - N // 2, 16], kv<bf16, heads=1, k=8, v=8, page=16>[M // 16] alias %kv0) {
  %embed.weight = param(name="embed \\"w\\".weight") : bf16[32, 16]
  %h = nn.embedding(%ids, %embed.weight) : bf16[N, 16]
  %wn = param(name="norm") : bf16[16]
  %x, %r = nn.add_rms_norm(%h, %h, %wn, eps=1e-05) : bf16[N, 16], bf16[N, 16]
  %wq = param(name="qkv") : bf16[32, 16]
  %qkv = nn.linear(%x, %wq) : bf16[N, 32]
  %kv1, %q = kv.append(%kv0, %qkv, %pos, %seq, %table, q_heads=2) : \
kv<bf16, heads=1, k=8, v=8, page=16>[M // 16], bf16[N, 2, 8]
  %a = kv.attend(%kv1, %q, %pos, %seq, %start, %table, scale=0.35) : bf16[N, 2, 8]
  %flat = t.reshape(%a, shape=[N, 16]) : bf16[N, 16]
  %wo = param(name="o") : bf16[16, 16]
  %o = nn.linear(%flat, %wo, partial=@tp) : f32[N, 16] partial(@tp)
  %f = comm.all_reduce_start(%o, group=@tp) : !future<f32[N, 16]>
  %s = comm.wait(%f) : f32[N, 16]
  %s16 = t.cast(%s, dtype=bf16) : bf16[N, 16]
  %cl = t.clamp(%s16, hi=30.0) : bf16[N, 16]
  %c = t.const(value=-inf) : f32[]
  %m = t.max(%cl, %c) : bf16[N, 16]
  %sl = t.slice(%m, axis=0, start=N // 2, stop=N) : bf16[N - N // 2, 16]
  return %sl, %kv1
}
"""


def test_ranges_and_names_of_outputs_are_the_interface() -> None:
    module = parse_module(SAMPLE)
    func = module.funcs["step"]
    assert func.ranges == {func.arg("pos"): ValueRange(0, 63)} and func.outputs == {0: "rows"}
    digest = structural_hash(module)
    for other in (SAMPLE.replace("in [0, 63]", "in [0, 62]"), SAMPLE.replace("(rows: ", "(hidden: ")):
        assert structural_hash(parse_module(other)) != digest
    spec = interface_of(func)
    assert spec.input("pos") == TensorSpec("pos", "i32", ("N",), ValueRange(0, 63)) and spec.output("rows") is not None


@pytest.mark.parametrize(("given", "match"), [("[5, 4]", "empty"), ("[0]", "','"), ("0, 4]", "'\\['")])
def test_ranges_that_are_none(given: str, match: str) -> None:
    with pytest.raises(IrError, match=match):
        parse_module(SAMPLE.replace("in [0, 63]", f"in {given}"))
    with pytest.raises(IrError, match="no range"):
        parse_module(SAMPLE.replace("page=16>[M // 16]\n)", "page=16>[M // 16] in [0, 4]\n)"))


def test_sample_is_a_fixed_point() -> None:
    module = parse_module(SAMPLE, "sample.xir")
    verify(module)
    assert print_module(module) == SAMPLE
    assert print_module(clone_module(module)) == SAMPLE
    assert structural_hash(clone_module(module)) == structural_hash(module)
    assert module.scope.symbols["N"].why == "tokens in this step"
    assert module.funcs["step"].aliases == {1: module.funcs["step"].arg("kv0")}


def test_locations_print_on_request_and_parse() -> None:
    module = parse_module(SAMPLE)
    op = module.funcs["step"].ops[5]
    op.loc = Loc('odd "name".py', 7, "model.layers.0", ("fuse-qkv/concat", "cse/merge"))
    text = print_module(module, loc=True)
    assert 'loc("odd \\"name\\".py":7, "model.layers.0", "fuse-qkv/concat", "cse/merge")' in text
    again = parse_module(text, "elsewhere.xir")
    assert print_module(again, loc=True) == text
    assert again.funcs["step"].ops[5].loc == op.loc
    assert "loc(" not in print_module(again)
    assert structural_hash(again) == structural_hash(module)


def test_comments_are_free() -> None:
    noisy = SAMPLE.replace("    %seq: i32[N],", "    // a line of its own\n    %seq: i32[N],  // trailing\n\n")
    noisy = noisy.replace("\n) -> (", "\n    // after the last argument\n) -> (")
    noisy = noisy.replace("  return", "  // CHECK: return\n  return")
    assert print_module(parse_module("// RUN: something\n" + noisy)) == SAMPLE


def test_names_are_unique_and_stay() -> None:
    module = Module()
    func = module.add_func("f")
    x = func.add_arg("x", Tensor("f32", [2]))
    b = Builder.at_end(func)
    for hint in ("x", "x", "x_1", "", "", "bad name!", "x_1_1"):
        x = b.create(Neg, x, hint=hint).result
    func.set_returns([x])
    text = print_module(module)
    names = [line.split()[0] for line in text.splitlines() if line.startswith("  %")]
    assert names == ["%x_1", "%x_2", "%x_3", "%neg", "%neg_1", "%bad_name_", "%x_1_1"]
    assert print_module(parse_module(text)) == text


def test_a_made_up_name_never_takes_a_given_one() -> None:
    module = Module()
    func = module.add_func("f")
    x = func.add_arg("x_1", Tensor("f32", [2]))
    b = Builder.at_end(func)
    for _ in range(3):
        x = b.create(Neg, x, hint="x").result
    func.set_returns([x])
    text = print_module(module)
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  %")] == ["%x", "%x_2", "%x_3"]
    assert print_module(parse_module(text)) == text


@pytest.mark.parametrize("value", [0.1, 1.0, -0.0, 1e300, 5e-324, float("inf"), -float("inf"), float("nan"), 3.0e-05])
def test_floats_survive(value: float) -> None:
    module = Module()
    func = module.add_func("f")
    x = func.add_arg("x", Tensor("f32", [2]))
    b = Builder.at_end(func)
    b.create(Const, value=value)
    func.set_returns([b.create(Clamp, x, lo=value).result])
    text = print_module(module)
    again = parse_module(text)
    assert print_module(again) == text
    got = again.funcs["f"].ops[0].attrs["value"]
    assert repr(got) == repr(value)


@pytest.mark.parametrize(
    ("value", "dtype", "text"), [(3, "i32", "value=3"), (True, "bool", "value=true"), (-7, "i64", "-7")]
)
def test_other_constants_survive(value: int, dtype: str, text: str) -> None:
    module = Module()
    func = module.add_func("f")
    func.set_returns([Builder.at_end(func).create(Const, value=value, dtype=dtype).result])
    printed = print_module(module)
    assert text in printed and print_module(parse_module(printed)) == printed


def test_buf_stage_attributes() -> None:
    module = Module("buf")
    n = module.scope.declare("N", 1, 8)
    func = module.add_func("f")
    x = func.add_arg("x", Tensor("f32", [n, 4]))
    b = Builder.at_end(func)
    a = b.create(Neg, x, at=[0])
    y = b.create(Slice, a.result, axis=1, start=0, stop=2)
    func.set_returns([y.result])
    func.arena = 16 * n
    verify(module)
    text = print_module(module)
    assert "stage=buf" in text and "at=[0]" in text and ") arena(16*N) {" in text
    again = parse_module(text)
    assert print_module(again) == text and structural_hash(again) == structural_hash(module)
    assert again.funcs["f"].arena is func.arena


@pytest.mark.parametrize(
    ("old", "new", "message", "line", "caret"),
    [
        ("xir 1", "xir 2", "version 2 is not known", 1, "2"),
        ("stage=graph", "stage=fast", "unknown stage", 1, "fast"),
        ("assume N - B >= 0", "assume N - B > 0", "an assumption reads", 6, "assume"),
        ("dim B in [1, 256]", "dim B in [9, 2]", "no multiple of 1", 3, "dim B in [9, 2]"),
        ("%ids: i32[N]", "%ids: i31[N]", "unknown dtype 'i31'", 12, "i31"),
        ("%ids: i32[N]", "%ids: i32[N", "in dim expression", 13, "%pos"),
        ("%h = nn.embedding(%ids", "%h = nn.embedding(%idz", "%idz is not defined", 20, "%idz"),
        ("%wq = param", "%x = param", "%x is defined twice", 23, "%x"),
        ("nn.linear(%x, %wq)", "nn.linaer(%x, %wq)", "unknown op nn.linaer", 24, "nn.linaer"),
        ("nn.linear(%x, %wq)", "nn.linear(%x, %wo)", "%wo is not defined", 24, "%wo"),
        ("nn.linear(%x, %wq)", "nn.linear(%x)", "operand w is missing", 24, "nn.linear"),
        ("%wq) : bf16[N, 32]", "%wq) : bf16[N, 33]", "yields bf16\\[N, 32\\]", 24, "bf16[N, 33]"),
        ("eps=1e-05", "epz=1e-05", "no attribute 'epz'", 22, "epz"),
        ("eps=1e-05", "eps=tiny", "expected a number", 22, "tiny"),
        ("eps=1e-05", "eps=1e-05, eps=1.0", "eps is given twice", 22, "eps"),
        ("%x, %r =", "%x =", "has 2 results, 1 are named", 22, "%x"),
        ("shape=[N, 16]", "shape=[N, 17]", "16\\*N elements are not provably 17\\*N", 27, "t.reshape"),
        ("group=@tp", "group=@pp", "which the module does not declare", 30, "comm.all_reduce_start"),
        ("  return %sl, %kv1\n", "", "ends without `return`", 37, "}"),
        ("return %sl, %kv1", "return %m, %kv1", "its signature says", 18, "("),
        ("%c = t.const", "%c ? t.const", "unexpected character", 34, "?"),
        ("[N, 16]) : bf16", "[N, 16] : bf16", "expected", 27, None),
    ],
)
def test_errors_show_line_and_caret(old: str, new: str, message: str, line: int, caret: str | None) -> None:
    assert SAMPLE.count(old) >= 1
    with pytest.raises(IrError, match=message) as e:
        parse_module(SAMPLE.replace(old, new, 1), "dir/sample.xir")
    where = e.value.where.splitlines()
    assert where[0].startswith(f"dir/sample.xir:{line}:"), e.value
    assert set(where[2].strip()) == {"^"}
    if caret is not None:
        assert where[1][where[2].index("^") :].startswith(caret), e.value


def test_truncated_text_is_an_error_everywhere() -> None:
    for cut in range(1, len(SAMPLE) - 1, 7):
        text = SAMPLE[:cut]
        try:
            module = parse_module(text)
        except IrError:
            continue
        assert "func" not in text or not module.funcs, text[-40:]


def test_hash_sees_what_matters() -> None:
    base = structural_hash(parse_module(SAMPLE))
    same = [("%qkv", "%renamed"), ("// tokens in this step", "// other words")]
    for old, new in same:
        assert structural_hash(parse_module(SAMPLE.replace(old, new))) == base
    different = [
        ("1e-05", "1e-06"),
        ("N in [1, 8192]", "N in [1, 4096]"),
        ("assume N - B >= 0", "assume N - B + 1 >= 0"),
        ("size=8", "size=4"),
        ("stride=8", "stride=16"),
        (" rank=R", ""),
        ("%ids", "%tokens"),
        ("hi=30.0", "lo=30.0"),
        ('name="o"', 'name="p"'),
        ("t.max", "t.min"),
    ]
    for old, new in different:
        assert structural_hash(parse_module(SAMPLE.replace(old, new))) != base, (old, new)


def test_a_broken_op_still_prints() -> None:
    module = Module()
    func = module.add_func("f")
    x = func.add_arg("x", Tensor("f32", [4, 8]))
    b = Builder.at_end(func)
    w = b.create(Param, name="w", type=Tensor("f32", [2, 8])).result
    y = b.create(Linear, x, w)
    y.result.type = Tensor("bf16", [1])
    assert "%linear = nn.linear(%x, %w) : bf16[1]" in print_module(module)
