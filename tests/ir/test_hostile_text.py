"""Texts that are no modules, or modules beyond all measure: an error that names the place, soon, and nothing else."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.lexer import MAX_TEXT, MAX_TOKENS
from xllm_compiler.ir.parser import MAX_OPS, parse_module
from xllm_compiler.ir.verify import verify
from xllm_compiler.tools import bisect, opt, reduce, run

HEAD = "xir 1 stage=graph\n"
MANY = 100_000


SOON = 20  # seconds; a tenth of it on a machine that does nothing else


def func(body: str, args: str = "", results: str = "") -> str:
    return f"{HEAD}func @f({args}) -> ({results}) {{\n{body}\n}}\n"


def of_type(text: str) -> str:
    return func("return", f"%a: {text}")


REFUSED = {
    "spaces after assume": f"{HEAD}assume{' ' * MANY}x",
    "spaces in an assumption": f"{HEAD}assume N{' ' * MANY}>{' ' * MANY}",
    "many comparisons": f"{HEAD}assume {'x >= ' * MANY}",
    "many zeroes": f"{HEAD}assume {'x >= 0' * MANY} y",
    "words": f"{HEAD}assume {'x ' * MANY}",
    "digits in a range": f"{HEAD}dim N in [1, {'9' * 5000}]",
    "a million digits": f"{HEAD}dim N in [1, {'9' * 1_000_000}]",
    "20 digits": f"{HEAD}dim N in [1, 18446744073709551616]",
    "digits of a version": f"xir {'9' * 5000} stage=graph",
    "digits of a group": f"{HEAD}group @a size={'9' * 5000}",
    "digits of heads": of_type(f"kv<bf16, heads={'9' * 5000}, k=1, v=1, page=16>[1]"),
    "digits of a line": func(f'%b = t.neg(%a) : f32[2] loc("x":{"9" * 5000}) return', "%a: f32[2]"),
    "digits of a constant": func(f"%a = t.const(value={'9' * 5000}) : f32[] return"),
    "digits of a fraction": func(f"%a = t.const(value=1{'0' * 400}.5) : f32[] return"),
    "an exponent": func("%a = t.const(value=1e999) : f32[] return"),
    "a long exponent": func(f"%a = t.const(value=1e{'9' * MANY}) : f32[] return"),
    "digits of an axis": func("%b = t.softmax(%a, axis=99999999999999999999) : f32[2] return", "%a: f32[2]"),
    "futures": of_type("!future<" * 5000 + "f32[1]" + ">" * 5000),
    "two futures": of_type("!future<!future<f32[1]>>"),
    "parentheses": of_type(f"f32[{'(' * 5000}1{')' * 5000}]"),
    "minus signs": of_type(f"f32[{'-' * 15000}1]"),
    "brackets": of_type(f"f32[{'[' * MANY}]"),
    "open parentheses": f"{HEAD}func {'(' * MANY}",
    "half a surrogate pair": func('%w = param(name="\\ud800") : f32[1] return'),
    "the other half": func('%w = param(name="a\\udfffb") : f32[1] return'),
    "a half in the text": f"{HEAD}// \ud800\n\ud800",
    "backslashes": f'{HEAD}func @f() -> () {{ %a = param(name="{chr(92) * MANY}',
    "quotes": HEAD + '"' * MANY,
    "a negative size": of_type("f32[-1]"),
    "a negative formula": f"{HEAD}dim N in [1, 5]\nfunc @f(%a: f32[N - 6]) -> () {{ return }}",
    "a negative symbol": f"{HEAD}dim N in [-5, -1]\nfunc @f(%a: f32[N]) -> () {{ return }}",
    "a negative result": func("%b = t.reshape(%a, shape=[-2, -2]) : f32[-2, -2] return", "%a: f32[4]"),
    "a size beyond words": of_type("f32[9223372036854775808]"),
    "a hundred axes": of_type(f"f32[{', '.join(['1'] * 100)}]"),
    "negative heads": of_type("kv<bf16, heads=-1, k=1, v=1, page=16>[1]"),
    "no page": of_type("kv<bf16, heads=1, k=1, v=1, page=0>[1]"),
    "negative pages": of_type("kv<bf16, heads=1, k=1, v=1, page=16>[-1]"),
    "no ranks": f"{HEAD}group @a size=0",
    "no multiple": f"{HEAD}dim N in [1, 5] % 0",
    "a sum of 8,000": of_type(f"f32[{'+'.join(['N'] * 8000)}]"),
    "a product of 8,000": of_type(f"f32[{'*'.join(['N'] * 8000)}]"),
    "a product of sums": of_type(f"f32[{'*'.join(['(N + B + S + P + 1)'] * 700)}]"),
    "a power": of_type("f32[9**9**9]"),
    "a long number": of_type(f"f32[{'*'.join(['9' * 900] * 16)}]"),
    "many minima": of_type(f"f32[min({', '.join(f'{i}*N' for i in range(1800))})]"),
    "percent signs": HEAD + "%" * MANY,
    "dashes": HEAD + "-" * MANY,
    "dots": HEAD + "a." * MANY,
    "at signs": HEAD + "@" + "a.-" * MANY,
    "divisions": f"{HEAD}func @f(%a: f32[N {'//' * MANY}",
    "tabs": "xir 1 stage=graph\ndim\t" + "\t" * MANY + "\r" * MANY,
    "an op of a long name": func("a" * MANY + "() return"),
    "a NUL": HEAD + "\0",
    "a byte order mark": "\ufeff" + HEAD,
    "nothing": "",
    "a text beyond all measure": HEAD + " " * MAX_TEXT,
    "tokens beyond all measure": HEAD + "a " * (MAX_TOKENS + 1),
    "a million ops": func("%b = t.neg(%a) : f32[2]\n" * 1_000_000 + "return", "%a: f32[2]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_place(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(XllmError) as caught:
        verify(parse_module(REFUSED[name], "hostile.xir"))
    assert time.monotonic() - began < SOON
    error = caught.value
    assert error.kind == "ir" and len(str(error)) < 3000
    assert error.where.startswith("hostile.xir:") or error.message.startswith(("V4", "V9", "V20")), error.where
    error.message.encode(), error.help.encode()


def test_too_many_ops_are_counted() -> None:
    ops = "".join(f"%a{i} = t.const(value=1.0) : f32[]\n" for i in range(MAX_OPS + 1))
    with pytest.raises(XllmError, match=f"more than {MAX_OPS} ops"):
        parse_module(func(ops + "return"), "hostile.xir")


@pytest.mark.parametrize("count", [20_000, 80_000])
def test_long_assumptions_take_no_longer_than_they_are(count: int) -> None:
    """An assumption may be as long as it likes; the time to find its end is in proportion."""
    for text in (f"assume{' ' * count}N >= 0", f"assume N >={' ' * count}0", f"assume N >= 0{' ' * count}// why"):
        began = time.monotonic()
        module = parse_module(f"{HEAD}dim N in [0, 8]\n{text}\n", "x.xir")
        assert time.monotonic() - began < 1
        assert str(module.scope.assumptions[0].expr) == "N"


@pytest.mark.parametrize(
    ("line", "expr", "why"),
    [
        ("assume N - B >= 0", "N - B", ""),
        ("assume N // 2 - B >= 0  // half", "N // 2 - B", "half"),
        ("assume  N>=0//why >= 0", "N", "why >= 0"),
        ("assume N - 1 >=  0\t // x // y", "N - 1", "x // y"),
    ],
)
def test_what_an_assumption_may_look_like(line: str, expr: str, why: str) -> None:
    module = parse_module(f"{HEAD}dim N in [1, 8]\ndim B in [1, 4]\n{line}\n", "x.xir")
    (found,) = module.scope.assumptions
    assert (str(found.expr), found.why) == (expr, why)


ROOT = Path(__file__).resolve().parents[1]
PIECES = [
    *"()[]<>{}%@,:!-N",
    *("//", '"', "\\", "9" * 30, "assume ", "f32[", "kv<", "!future<", "loc(", "\n", "\0"),
    *("\ud800", "1e99", "-1", ">= 0", "\u0660", "\x85"),
]


def mutate(draw: random.Random, text: str) -> str:
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        end = min(len(text), at + draw.choice([0, 1, 3, 20]))
        piece = draw.choice([draw.choice(PIECES) * draw.choice([1, 1, 50]), text[draw.randrange(len(text)) :][:30], ""])
        text = text[:at] + piece + text[end:]
        if draw.random() < 0.1:
            lines = text.split("\n")
            draw.shuffle(lines)
            text = "\n".join(lines)
        text = text or " "
    return text


def judged(text: str) -> bool:
    """Whether it is a module; anything but that and a typed error fails the test."""
    began = time.monotonic()
    try:
        verify(parse_module(text, "mutated.xir"))
        return True
    except XllmError as error:
        assert error.kind == "ir", error
        return False
    finally:
        assert time.monotonic() - began < SOON


def test_mutated_modules() -> None:
    """300 of the modules that are tests elsewhere, changed at random: errors of kind ir, or modules."""
    draw = random.Random(0)
    files = sorted(ROOT.glob("passes/**/*.xir"))
    sound = 0
    for _ in range(300):
        sound += judged(mutate(draw, draw.choice(files).read_text()))
    assert 5 < sound < 250, "mutations that never or always hurt would say little"


@pytest.mark.slow
def test_many_mutated_modules_through_the_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(1)
    files = sorted(ROOT.glob("passes/**/*.xir"))
    for _ in range(300):
        text = mutate(draw, draw.choice(files).read_text())
        on_tools(text, tmp_path, capsys, monkeypatch)


def on_tools(text: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.chdir(folder)
    (folder / "x.xir").write_text(text, encoding="utf-8", errors="surrogatepass")
    codes = []
    for main, flags in (
        (opt.main, ["-p", "dce"]),
        (run.main, []),
        (reduce.main, ["-p", "dce"]),
        (bisect.main, ["-p", "dce"]),
    ):
        began = time.monotonic()
        codes.append(main(["x.xir", *flags]))
        told = capsys.readouterr().err
        assert "internal" not in told and "Traceback" not in told, told
        assert time.monotonic() - began < SOON
    return codes


ON_TOOLS = {
    **{name: REFUSED[name] for name in ("spaces after assume", "a million digits", "futures", "half a surrogate pair",
                                        "a negative size", "quotes", "a byte order mark")},
    "an array larger than any machine": func(
        "%b = t.neg(%a) : f32[9223372036854775807]\nreturn %b",
        "%a: f32[9223372036854775807]",
        "f32[9223372036854775807]",
    ),
    "elements that no word counts": func(
        "%b = t.neg(%a) : f32[1000000000, 1000000000, 1000000000]\nreturn %b",
        "%a: f32[1000000000, 1000000000, 1000000000]",
        "f32[1000000000, 1000000000, 1000000000]",
    ),
    "a result larger than any machine": func(
        "%b = t.expand(%a, shape=[9000000000000000000]) : f32[9000000000000000000]\nreturn %b",
        "%a: f32[1]",
        "f32[9000000000000000000]",
    ),
    "garbage": random.Random(3).randbytes(4000).decode("latin1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_TOOLS)
def test_tools_say_it_too(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = on_tools(ON_TOOLS[name], tmp_path, capsys, monkeypatch)
    assert codes[1] == 2
