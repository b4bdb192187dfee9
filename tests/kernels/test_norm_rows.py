"""Norms that quantize their rows: bit for bit what a norm and a quantization store, one after the other."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from levels import LEVELS

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.native.standalone import Standalone
from xllm_compiler.kernels.tir.rows.norm_rows import NormRows
from xllm_compiler.kernels.tir.rows.norms import LayerNorm, RmsNorm
from xllm_compiler.kernels.tir.rows.quantize import QuantizeRows
from xllm_compiler.weight_formats import RowFormat

NUMPY = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}
ROWS = 9


def room(n: int, group: int) -> list[np.ndarray]:
    """Places for stored values, scales and sums, with a row more than is asked for."""
    form = RowFormat(group)
    shapes = ((ROWS + 1, form.padded(n)), (ROWS + 1,), (ROWS + 1, form.groups(n)))
    return [np.full(shape, 9, dtype) for shape, dtype in zip(shapes, (np.int8, np.float32, np.int32), strict=True)]


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("kind, weight, bias", [("rms", True, False), ("rms", False, False), ("layer", True, True)])
@pytest.mark.parametrize("n, group, rotate", [(1, 0, 0), (37, 0, 0), (200, 32, 0), (1024, 0, 0), (640, 0, 64)])
def test_the_bits_are_those_of_two_kernels(
    isa: str, dtype: str, kind: str, weight: bool, bias: bool, n: int, group: int, rotate: int
) -> None:
    rng = np.random.default_rng(n)
    x = (rng.standard_normal((ROWS, n)) * 3 + 1).astype(NUMPY[dtype])
    x[3] = 0
    x[5, n - 1] = np.inf
    vectors = [rng.standard_normal(n).astype(NUMPY[dtype]) for _ in range(weight + bias)]
    if kind == "rms":
        norm = Standalone(RmsNorm(n, dtype, 1e-6, 1.0, weight), ISAS[isa])
        fused = Standalone(NormRows("rms", n, dtype, 1e-6, 1.0, weight, group=group, rotate=rotate), ISAS[isa])
    else:
        norm = Standalone(LayerNorm(n, dtype, 1e-6, weight, bias), ISAS[isa])
        fused = Standalone(NormRows("layer", n, dtype, 1e-6, 0.0, weight, bias, group, rotate), ISAS[isa])
    y, want = np.zeros_like(x), room(n, group)
    norm(x, *vectors, y, ROWS)
    Standalone(QuantizeRows(n, dtype, group, rotate), ISAS[isa])(y, *want, ROWS)
    assert np.isnan(want[1][5]) and np.isfinite(want[1][:5]).all()
    for rows, team in ((ROWS, 1), (ROWS, 3), (1, 1), (1, 2)):
        got = room(n, group)
        fused(x, *vectors, *got, rows, team=team)
        for mine, theirs in zip(got, want, strict=True):
            assert mine[:rows].tobytes() == theirs[:rows].tobytes(), (rows, team)
            assert (mine[rows:] == 9).all()


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "group"}, {"n": 0}, {"n": 1 << 20}, {"dtype": "f16"}, {"bias": True}, {"kind": "layer"}, {"rotate": 64}],
)
def test_what_has_no_code_is_refused(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"kind": "rms", "n": 8, "dtype": "bf16", "eps": 1e-6, "offset": 1.0}
    with pytest.raises(XllmError, match=r"norm|rotating"):
        NormRows(**{**fields, **wrong})  # type: ignore[arg-type]
