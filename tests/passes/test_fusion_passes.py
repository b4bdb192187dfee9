"""fuse-add-norm, fuse-epilogue and fuse-glu: positive, unchanged and equivalence cases."""

from __future__ import annotations

import pytest

from xllm_compiler.testing.xir import Case

HEAD = "xir 1 stage=graph\ndim N in [1, 64]\n"
PARAMS = """  %w = param(name="w") : DT[16, 16]
  %v = param(name="v") : DT[16, 16]
  %w2 = param(name="w2") : DT[32, 16]
  %b = param(name="b") : DT[16]
  %c = param(name="c") : DT[16]
  %b2 = param(name="b2") : DT[32]
  %n = param(name="n") : DT[16]
"""


def func(body: str, returns: str = "DT[N, 16]", args: str = "%x: DT[N, 16], %r: DT[N, 16]", dtype: str = "f32") -> Case:
    lines = "\n".join("  " + line.strip() for line in body.strip().splitlines())
    text = f"{HEAD}\nfunc @f({args}) -> ({returns}) {{\n{PARAMS}{lines}\n}}\n"
    return Case.parse(text.replace("DT", dtype))


# ----------------------------------------------------------------------------------------------------------- add + norm


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_add_norm_with_another_user_of_the_sum(dtype: str) -> None:
    case = func(
        """%s = t.add(%x, %r) : DT[N, 16]
        %e = t.exp(%s) : DT[N, 16]
        %y = nn.rms_norm(%s, w=%n, eps=1e-06, offset=1.0) : DT[N, 16]
        %z = t.add(%s, %e) : DT[N, 16]
        return %y, %z""",
        "DT[N, 16], DT[N, 16]",
        dtype=dtype,
    ).run("dce,fuse-add-norm")
    assert case.op_names() == ["nn.add_rms_norm", "t.exp", "t.add"]
    assert "%y, %s = nn.add_rms_norm(%x, %r, %n, eps=1e-06, offset=1.0)" in case.text
    case.check_same()


def test_add_norm_moves_a_late_weight_up() -> None:
    case = func(
        """%s = t.add(%x, %r) : DT[N, 16]
        %e = t.exp(%s) : DT[N, 16]
        %late = param(name="late") : DT[16]
        %y = nn.rms_norm(%s, w=%late, eps=1e-06) : DT[N, 16]
        return %y, %e""",
        "DT[N, 16], DT[N, 16]",
    ).run("fuse-add-norm")
    assert "nn.add_rms_norm" in case.op_names()
    case.check_same()


def test_two_norms_of_one_sum_share_it() -> None:
    case = func(
        """%s = t.add(%x, %r) : DT[N, 16]
        %y = nn.rms_norm(%s, w=%n, eps=1e-06) : DT[N, 16]
        %z = nn.rms_norm(%s, w=%b, eps=1e-06) : DT[N, 16]
        return %y, %z""",
        "DT[N, 16], DT[N, 16]",
    ).run("fuse-add-norm")
    assert sorted(case.op_names()) == ["nn.add_rms_norm", "nn.rms_norm"]
    case.check_same()


@pytest.mark.parametrize(
    "body",
    [
        "%s = t.add(%x, %b) : DT[N, 16]\n %y = nn.rms_norm(%s, w=%n, eps=1e-06) : DT[N, 16]",  # broadcasts
        "%s = t.add(%x, %r) : DT[N, 16]\n %y = nn.rms_norm(%s, eps=1e-06) : DT[N, 16]",  # no weight
        "%s = t.mul(%x, %r) : DT[N, 16]\n %y = nn.rms_norm(%s, w=%n, eps=1e-06) : DT[N, 16]",
    ],
)
def test_add_norm_unchanged(body: str) -> None:
    case = func(body + "\n return %y").run("dce")
    before = case.text
    case.run("fuse-add-norm")
    assert case.text == before


# ------------------------------------------------------------------------------------------------------------- epilogue


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("act", "name"),
    [
        ("%a = t.silu(%p) : DT[N, 16]", "silu"),
        ("%a = t.gelu(%p) : DT[N, 16]", "gelu"),
        ("%a = t.gelu(%p, tanh=true) : DT[N, 16]", "gelu_tanh"),
        ("%a = t.relu(%p) : DT[N, 16]", "relu"),
        ("%q = t.relu(%p) : DT[N, 16]\n %a = t.mul(%q, %q) : DT[N, 16]", "relu2"),
        ("%q = t.relu(%p) : DT[N, 16]\n %t = t.const(value=2.0) : f32[]\n %a = t.pow(%q, %t) : DT[N, 16]", "relu2"),
        ("%a = t.sigmoid(%p) : DT[N, 16]", "sigmoid"),
        ("%a = t.tanh(%p) : DT[N, 16]", "tanh"),
    ],
)
def test_epilogue_takes_bias_activation_and_residual(act: str, name: str, dtype: str) -> None:
    case = func(
        f"""%y = nn.linear(%x, %w) : DT[N, 16]
        %p = t.add(%y, %b) : DT[N, 16]
        {act}
        %h = t.add(%r, %a) : DT[N, 16]
        return %h""",
        dtype=dtype,
    ).run("dce,fuse-epilogue")
    assert case.op_names() == ["nn.linear"]
    assert f"%h = nn.linear(%x, %w, bias=%b, residual=%r, act={name})" in case.text
    case.check_same()


def test_the_later_of_two_linears_hosts_their_sum() -> None:
    case = func(
        """%a = nn.linear(%x, %w) : DT[N, 16]
        %m = nn.linear(%r, %v) : DT[N, 16]
        %h = t.add(%m, %a) : DT[N, 16]
        return %h"""
    ).run("dce,fuse-epilogue")
    assert "%h = nn.linear(%r, %v, residual=%a)" in case.text
    case.check_same()


def test_a_parallel_block_is_two_linears_with_residuals() -> None:
    case = func(
        """%a = nn.linear(%x, %w) : DT[N, 16]
        %m = nn.linear(%x, %v, act=relu) : DT[N, 16]
        %s = t.add(%m, %a) : DT[N, 16]
        %h = t.add(%s, %r) : DT[N, 16]
        return %h"""
    ).run("dce,fuse-epilogue")
    assert case.op_names() == ["nn.linear", "nn.linear"]
    assert "nn.linear(%x, %w, residual=%r)" in case.text and "%h = nn.linear(%x, %v, residual=" in case.text
    case.check_same()


def test_epilogue_options() -> None:
    body = """%y = nn.linear(%x, %w) : DT[N, 16]
        %p = t.add(%y, %b) : DT[N, 16]
        %a = t.silu(%p) : DT[N, 16]
        %h = t.add(%a, %r) : DT[N, 16]
        return %h"""
    assert func(body).run("fuse-epilogue{act=false,residual=false}").op_names() == ["nn.linear", "t.silu", "t.add"]
    assert func(body).run("fuse-epilogue{bias=false}").op_names() == ["nn.linear", "t.add", "t.silu", "t.add"]
    assert func(body).run("fuse-epilogue{residual=false}").op_names() == ["nn.linear", "t.add"]


@pytest.mark.parametrize(
    ("body", "returns"),
    [
        ("%y = nn.linear(%x, %w) : DT[N, 16]\n %h = t.add(%y, %r) : DT[N, 16]\n return %h, %y", "DT[N, 16], DT[N, 16]"),
        ("%y = nn.linear(%x, %w) : DT[N, 16]\n %h = t.add(%y, %y) : DT[N, 16]\n return %h", "DT[N, 16]"),
        ("%y = nn.linear(%x, %w) : DT[N, 16]\n %h = t.mul(%y, %r) : DT[N, 16]\n return %h", "DT[N, 16]"),
        (
            "%y = nn.linear(%x, %w, residual=%r) : DT[N, 16]\n %h = t.silu(%y) : DT[N, 16]\n return %h",
            "DT[N, 16]",
        ),
        (
            "%y = nn.linear(%x, %w, act=silu) : DT[N, 16]\n %h = t.add(%y, %b) : DT[N, 16]\n return %h",
            "DT[N, 16]",
        ),
    ],
    ids=["another user", "itself", "product", "after residual", "bias after activation"],
)
def test_epilogue_unchanged(body: str, returns: str) -> None:
    case = func(body, returns).run("dce")
    before = case.text
    assert case.run("fuse-epilogue").text == before


def test_a_partial_sum_keeps_its_epilogue_out() -> None:
    case = Case.parse(
        HEAD
        + """group @tp size=1

func @f(%x: f32[N, 16], %r: f32[N, 16]) -> (f32[N, 16]) {
  %w = param(name="w") : f32[16, 16]
  %y = nn.linear(%x, %w, partial=@tp) : f32[N, 16] partial(@tp)
  %f = comm.all_reduce_start(%y, group=@tp) : !future<f32[N, 16]>
  %s = comm.wait(%f) : f32[N, 16]
  %h = t.add(%s, %r) : f32[N, 16]
  return %h
}
"""
    ).run("fuse-epilogue")
    assert not case.changed


# ------------------------------------------------------------------------------------------------------------------ glu


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_glu_of_two_linears(act: str, bias: bool, dtype: str) -> None:
    gate, up = (", bias=%b", ", bias=%c") if bias else ("", "")
    case = func(
        f"""%g = nn.linear(%x, %w{gate}) : DT[N, 16]
        %u = nn.linear(%x, %v{up}) : DT[N, 16]
        %a = t.{act}(%g) : DT[N, 16]
        %y = t.mul(%u, %a) : DT[N, 16]
        return %y""",
        dtype=dtype,
    ).run("fuse-glu,dce")
    assert case.op_names() == ["t.concat"] * (1 + bias) + ["nn.linear_glu"]
    assert f"%y = nn.linear_glu(%x, %concat{', bias=%concat_1' if bias else ''}" in case.text
    case.check_same()


@pytest.mark.parametrize(
    ("gate", "up", "step", "left"),
    [
        ((0, 16), (16, 32), 1, ["nn.linear_glu"]),  # phi-3, glm-4: the weight is right as it is
        ((16, 32), (0, 16), 1, ["t.slice", "t.slice", "t.concat", "nn.linear_glu"]),  # up first
        ((0, 31), (1, 32), 2, ["t.slice", "t.slice", "t.concat", "nn.linear_glu"]),  # interleaved
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_glu_of_one_projection(
    gate: tuple[int, int], up: tuple[int, int], step: int, left: list[str], bias: bool
) -> None:
    case = func(
        f"""%p = nn.linear(%x, %w2{", bias=%b2" if bias else ""}) : DT[N, 32]
        %g = t.slice(%p, axis=1, start={gate[0]}, stop={gate[1]}, step={step}) : DT[N, 16]
        %u = t.slice(%p, axis=1, start={up[0]}, stop={up[1]}, step={step}) : DT[N, 16]
        %a = t.silu(%g) : DT[N, 16]
        %y = t.mul(%a, %u) : DT[N, 16]
        return %y"""
    ).run("fuse-glu,fold,dce")
    names = case.op_names()
    assert [n for n in left if n in names] and names[-1] == "nn.linear_glu" and "nn.linear" not in names
    if not bias:
        assert sorted(names) == sorted(left)
    case.check_same()


@pytest.mark.parametrize(
    ("body", "returns", "remark"),
    [
        (
            "%g = nn.linear(%x, %w) : DT[N, 16]\n %u = nn.linear(%r, %v) : DT[N, 16]\n %a = t.silu(%g) : DT[N, 16]\n"
            " %y = t.mul(%a, %u) : DT[N, 16]\n return %y",
            "DT[N, 16]",
            "",
        ),
        (
            "%g = nn.linear(%x, %w) : DT[N, 16]\n %u = nn.linear(%x, %v) : DT[N, 16]\n %a = t.silu(%g) : DT[N, 16]\n"
            " %y = t.mul(%a, %u) : DT[N, 16]\n return %y, %u",
            "DT[N, 16], DT[N, 16]",
            "another user",
        ),
        (
            "%g = nn.linear(%x, %w, bias=%b) : DT[N, 16]\n %u = nn.linear(%x, %v) : DT[N, 16]\n"
            " %a = t.silu(%g) : DT[N, 16]\n %y = t.mul(%a, %u) : DT[N, 16]\n return %y",
            "DT[N, 16]",
            "bias",
        ),
        (
            "%g = nn.linear(%x, %w) : DT[N, 16]\n %a = t.sigmoid(%g) : DT[N, 16]\n %y = t.mul(%a, %g) : DT[N, 16]\n"
            " return %y",
            "DT[N, 16]",
            "",
        ),
    ],
    ids=["different inputs", "up is used elsewhere", "one bias", "silu spelled out"],
)
def test_glu_unchanged(body: str, returns: str, remark: str) -> None:
    case = func(body, returns).run("dce")
    before = case.text
    case.run("fuse-glu")
    assert case.text == before and remark in case.remarks()
