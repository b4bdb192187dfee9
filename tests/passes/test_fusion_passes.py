"""fuse-epilogue and fuse-glu: every activation, dtype and arrangement. Single situations are in the folders beside."""

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
