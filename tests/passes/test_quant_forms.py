"""The spelling of --quantize: what each form means, one canonical name for each, errors that say what to do."""

from __future__ import annotations

import itertools

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.passes.manager import parse_pipeline
from xllm_compiler.passes.quantize.forms import QuantForm, parse_form
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.weight_formats import GRIDS, GROUPS, GridFormat, IntegerFormat


@pytest.mark.parametrize(
    "text, form, name",
    [
        ("int8", QuantForm(IntegerFormat(8)), "w8a8"),
        ("W8A8", QuantForm(IntegerFormat(8)), "w8a8"),
        ("w8a16", QuantForm(IntegerFormat(8), 16), "w8a16"),
        ("w8a8-g32", QuantForm(IntegerFormat(8, 32)), "w8a8-g32"),
        ("int4", QuantForm(GridFormat(32)), "w4a8-grid32"),
        ("w4a8", QuantForm(GridFormat(32)), "w4a8-grid32"),
        ("int4-GRID16-kv8", QuantForm(GridFormat(16), kv=8), "w4a8-grid16-kv8"),
        ("int4-g32", QuantForm(IntegerFormat(4, 32)), "w4a8-g32"),
        ("int4-asym", QuantForm(IntegerFormat(4, 32, True)), "w4a8-g32-asym"),
        ("w4a16", QuantForm(IntegerFormat(4, 32), 16), "w4a16-g32"),
        ("int4-g128", QuantForm(IntegerFormat(4, 128)), "w4a8-g128"),
        ("w4a16-g64-asym", QuantForm(IntegerFormat(4, 64, True), 16), "w4a16-g64-asym"),
        ("w4a16-asym-g64", QuantForm(IntegerFormat(4, 64, True), 16), "w4a16-g64-asym"),
        ("kv8", QuantForm(None, 16, kv=8), "kv8"),
        ("int4-kv8-g64", QuantForm(IntegerFormat(4, 64), kv=8), "w4a8-g64-kv8"),
    ],
)
def test_what_it_means(text: str, form: QuantForm, name: str) -> None:
    assert parse_form(text) == form and str(form) == name


def test_every_form_survives_its_name_and_makes_a_pipeline() -> None:
    for bits, acts, group, zeros, kv in itertools.product((8, 4), (8, 16), (0, *GROUPS), (False, True), (8, 16)):
        if (bits == 4 and not group) or (bits == 8 and zeros):
            continue
        format = IntegerFormat(bits, group, zeros)
        form = QuantForm(format, acts, kv)
        assert parse_form(str(form)) == form
        text = str(parse_pipeline(",".join(Cpu.pipelines.quantized(form))))
        assert ("quantize-rows" in text) == (acts == 8) and ("quantize-kv" in text) == (kv == 8)
        assert f"{{format={format}" in text or format == IntegerFormat(8)  # the default is not printed
    for grid in GRIDS:
        form = QuantForm(GridFormat(grid))
        assert parse_form(str(form)) == form
        made = str(parse_pipeline(",".join(Cpu.pipelines.quantized(form))))
        assert f"quantize-weights{{format=q4grid{grid}}}" in made


def test_the_presets_are_the_short_names() -> None:
    assert Cpu.pipelines.quantized(parse_form("int8")) == Cpu.presets["cpu-int8"]
    assert Cpu.pipelines.quantized(parse_form("int4")) == Cpu.presets["cpu-int4"]


@pytest.mark.parametrize(
    "text, message, help",
    [
        ("int5", "'int5' is not a form", "did you mean int"),
        ("", "is not a form", "int8, int4"),
        ("w4", "'w4' is not a form", "did you mean w4a"),
        ("fp8", "'fp8' is not a form", "int8, int4"),
        ("w4a4", "weights of 4 bits by activations of 4", "activations 8, or 16"),
        ("w3a8", "weights of 3 bits", "8 or 4 bits"),
        ("w4a8-g48", "groups of 48", "g32, g64 or g128"),
        ("w4a8-grid64", "grids of 64", "grid16 or grid32"),
        ("w8a8-grid32", "grids of 32", "of w4a8"),
        ("w4a16-grid32", "grids of 32", "of w4a8"),
        ("int4-grid16-asym", "grids of 16", "zero point"),
        ("int4-g32-grid32", "says twice", ""),
        ("w8a8-g0", "groups of 0", "a scale per row"),
        ("w4a8-sym", "'sym' is not known", "-asym"),
        ("w4a8-", "'' is not known", "such as"),
        ("int4-g32-g64", "says twice", ""),
        ("int4-asym-asym", "says twice", ""),
        ("int8-asym", "zero points are for weights of 4 bits", "leave out -asym"),
    ],
)
def test_bad_forms(text: str, message: str, help: str) -> None:
    with pytest.raises(XllmError) as caught:
        parse_form(text)
    assert caught.value.kind == "option"
    assert message in caught.value.message and help in caught.value.help
