"""The polynomials against numpy in double precision, over the whole range, at every level this machine runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tvm.tirx.script.builder import ir as T

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.kernels.tir.codegen import vmath
from xllm_compiler.kernels.tir.codegen.builder import build_function, load, store
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, scalar
from xllm_compiler.kernels.tir.isa.levels import ISAS, LANES, Isa
from xllm_compiler.kernels.tir.native.standalone import Standalone


@dataclass(frozen=True)
class Map(Kernel):
    """y = function(x), in vectors, by member 0."""

    function: str

    @property
    def args(self) -> tuple[Arg, ...]:
        return (Arg("x", "f32"), Arg("y", "f32", written=True), scalar("vectors"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        def body(x: Any, y: Any, vectors: Any, member: Any, team: Any) -> None:
            with T.serial(0, vectors) as i:
                store(y, i * LANES, getattr(vmath, self.function)(load(x, i * LANES, "f32")), "f32")

        return build_function(self, isa, body)


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# name, exact function, range, error allowed in ulp of the result, error allowed absolutely
CASES: list[tuple[str, Callable[[Any], Any], float, float, float]] = [
    ("exp", np.exp, 87.0, 1.0, 0.0),
    ("tanh", np.tanh, 30.0, 2.0, 0.0),
    ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), 80.0, 2.5, 0.0),
    ("erf", np.vectorize(math.erf), 8.0, 2.0, 0.0),
    ("silu", lambda x: x / (1 + np.exp(-x)), 80.0, 3.0, 0.0),
    ("gelu", gelu, 10.0, 4.0, 4e-7),
    ("gelu_tanh", gelu_tanh, 10.0, 4.0, 4e-7),
]


@pytest.mark.parametrize("name, exact, reach, ulps, absolute", CASES)
def test_error_and_bits(name: str, exact: Callable[[Any], Any], reach: float, ulps: float, absolute: float) -> None:
    x = np.concatenate([np.linspace(-reach, reach, 100_000), np.geomspace(1e-30, 1, 20_000)]).astype(np.float32)
    x = x[: x.size // LANES * LANES]
    results = []
    for isa in machine_isas():
        y = np.zeros_like(x)
        Standalone(Map(name), ISAS[isa])(x, y, x.size // LANES)
        results.append(y)
    with np.errstate(under="ignore"):
        truth = exact(x.astype(np.float64))
    error = np.abs(results[0] - truth)
    allowed = ulps * np.spacing(np.abs(truth).astype(np.float32)) + absolute
    worst = np.argmax(error / allowed)
    assert (error <= allowed).all(), (x[worst], results[0][worst], truth[worst])
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), results[0].view(np.uint32))


def test_weights_of_a_softmax() -> None:
    """Within 1 ulp down to e^-60, and not below, whatever the distance; the same bits at every level."""
    x = np.concatenate([np.linspace(-60, 0, 100_000), -np.geomspace(1e-30, 1, 20_000)]).astype(np.float32)
    far = np.array([-60.5, -87, -104, -1e38, -np.inf, np.nan] + [0.0] * 10, np.float32)
    found = []
    for isa in machine_isas():
        y = np.zeros(x.size + LANES, np.float32)
        Standalone(Map("exp_of_negative"), ISAS[isa])(np.concatenate([x, far]), y, y.size // LANES)
        found.append(y)
    truth = np.exp(x.astype(np.float64))
    assert (np.abs(found[0][: x.size] - truth) <= np.spacing(truth.astype(np.float32))).all()
    assert (found[0][x.size :][:5] == found[0][0]).all() and np.isnan(found[0][x.size + 5])
    for other in found[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), found[0].view(np.uint32))


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid", "erf", "silu", "relu"])
def test_special_values(name: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e38, -1e38, 89.0, -104.0] + [1.0] * 7, np.float32)
    y = np.zeros_like(x)
    Standalone(Map(name), ISAS["avx2"])(x, y, 1)
    expected: dict[str, list[float]] = {
        "exp": [np.inf, 0, np.nan, 1, 1, np.inf, 0, np.inf, 0],
        "tanh": [1, -1, np.nan, 0, 0, 1, -1, 1, -1],
        "sigmoid": [1, 0, np.nan, 0.5, 0.5, 1, 0, 1, 0],
        "erf": [1, -1, np.nan, 0, 0, 1, -1, 1, -1],
        "silu": [np.inf, np.nan, np.nan, 0, 0, 1e38, 0, 89, 0],  # -inf * 0 is NaN, as in torch
        "relu": [np.inf, 0, np.nan, 0, 0, 1e38, 0, 89, 0],
    }
    np.testing.assert_allclose(y[:9], np.array(expected[name], np.float32), rtol=1e-6, atol=1e-36)
