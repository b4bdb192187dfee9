"""Every aten operation with a handler against torch: exported, imported, run in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend import aten  # noqa: F401
from xllm_compiler.frontend.importer import Importer
from xllm_compiler.frontend.trace import to_numpy
from xllm_compiler.interp import run
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Builder, Module, Value
from xllm_compiler.ir.types import Tensor

Fn = Callable[..., torch.Tensor]


class Wrapped(torch.nn.Module):
    def __init__(self, fn: Fn) -> None:
        super().__init__()
        self.fn = fn
        self.w = torch.nn.Buffer(torch.linspace(-1, 1, 48).reshape(6, 8))

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return self.fn(x, i, self.w)


def imported(fn: Fn, dtype: torch.dtype = torch.float32) -> tuple[Module, dict[str, Any]]:
    """@step(x [N, 8], i i32[N]) for fn(x, i, w [6, 8]), and its parameters."""
    n = torch.export.Dim("N", min=2, max=64)
    example = (torch.randn(5, 8).to(dtype), torch.arange(5, dtype=torch.int32))
    program = torch.export.export(Wrapped(fn), example, dynamic_shapes=({0: n}, {0: n}), strict=False)
    module = Module()
    size = module.scope.declare("N", 1, 64)
    func = module.add_func("step")
    inputs = {
        "x": func.add_arg("x", Tensor("bf16" if dtype == torch.bfloat16 else "f32", [size, 8])),
        "i": func.add_arg("i", Tensor("i32", [size])),
    }
    builder = Builder.at_end(func)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    im = Importer(builder, {str(nodes["x"].meta["val"].shape[0].node.expr): "N"})
    params: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if name in inputs:
            im.env[nodes[name]] = inputs[name]
            continue
        tensor = {**program.state_dict, **program.constants}[spec.target]
        params[name] = to_numpy(tensor)
        ours = {"float32": "f32", "int32": "i32", "bool": "bool"}[str(params[name].dtype)]
        im.env[nodes[name]] = builder.create(ops.Param, name=name, type=Tensor(ours, tensor.shape)).result
    (result,) = im.run(program.graph, lambda *_: None)
    assert isinstance(result, Value)
    func.set_returns([result])
    return module, params


OPS: dict[str, Fn] = {
    "add": lambda x, i, w: x + 2 - w[0] * 3,
    "add alpha": lambda x, i, w: torch.add(x, w[1], alpha=0.5),
    "rsub": lambda x, i, w: 1 - x,
    "div": lambda x, i, w: x / 3 + 1 / (x * x + 1),
    "floor div": lambda x, i, w: (i // 2).float()[:, None] + torch.div(x, 0.3, rounding_mode="floor"),
    "remainder": lambda x, i, w: x % 0.7 + (i % 3).float()[:, None],
    "pow": lambda x, i, w: x**2 + x.abs() ** 0.5 + 2.0**x,
    "mixed dtypes": lambda x, i, w: i[:, None] * x + i[:, None] / 2,
    "int scalar": lambda x, i, w: (i * 3 - 1).float()[:, None] * x,
    "compare": lambda x, i, w: torch.where(x > w[2], x, w[2]) + (i >= 2)[:, None].float() + (i[:, None] < x).float(),
    "logic": lambda x, i, w: ((x > 0) & ~(x > 1) | (x < -1)).float(),
    "masked_fill": lambda x, i, w: x.masked_fill(x < 0, -5.0),
    "unary": lambda x, i, w: x.exp() + x.sin() + x.cos() + x.tanh() + x.sigmoid() + x.neg() + x.erf() + x.floor(),
    "roots": lambda x, i, w: (x.abs() + 1).sqrt() + (x.abs() + 1).rsqrt() + (x.abs() + 1).log() + (x + 9).reciprocal(),
    "activations": lambda x, i, w: F.silu(x) + F.relu(x) + F.softplus(x) + F.leaky_relu(x, 0.1),
    "gelu": lambda x, i, w: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "expm1": lambda x, i, w: x.expm1() + x.abs().log1p(),
    "clamp": lambda x, i, w: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + torch.minimum(x, w[3]) + torch.maximum(x, w[3]),
    "casts": lambda x, i, w: x.to(torch.int32).to(x.dtype) + x.bool().float() + i.to(x).unsqueeze(1),
    "square": lambda x, i, w: torch.square(x) + torch.addcmul(x, x, w[0], value=2.0) + torch.lerp(x, w[0] + x, 0.25),
    "views": lambda x, i, w: x.view(-1, 2, 4).transpose(1, 2).reshape(x.shape[0], 8).unsqueeze(1).squeeze(1),
    "permute": lambda x, i, w: (
        x.view(-1, 2, 2, 2).permute(0, 3, 1, 2).flatten(1) + x.unflatten(1, (2, 4)).movedim(1, 2).reshape(-1, 8)
    ),
    "slices": lambda x, i, w: torch.cat([x[:, 1::2], x[:, -4:-2], x[:, 3:100:3]], dim=-1),
    "select": lambda x, i, w: x[:, 3:4] + x[:, -1, None] + w[-1] + x.narrow(1, 2, 1),
    "split": lambda x, i, w: torch.cat([*x.split([3, 5], dim=1)[::-1], *x.chunk(3, dim=-1), *x.split(4, 1)], 1),
    "unbind": lambda x, i, w: sum(x.view(-1, 4, 2).unbind(-1)),
    "stack": lambda x, i, w: torch.stack((x, -x), dim=-1).flatten(-2),
    "expand": lambda x, i, w: x[:, None, :].expand(-1, 3, -1).reshape(-1, 24) + w[0].expand_as(x).repeat(1, 3),
    "repeat": lambda x, i, w: x.repeat(1, 2) + x.repeat_interleave(2, dim=1),
    "pad": lambda x, i, w: F.pad(x, (1, 2), value=7.0),
    "full": lambda x, i, w: x + torch.full((8,), 2.5) + torch.ones_like(x) - torch.zeros(1, 8) + x.new_ones(8) * 3,
    "arange": lambda x, i, w: x + torch.arange(8) + torch.arange(2, 18, 2),
    "linear": lambda x, i, w: F.linear(x, w, w[:, 0]),
    "products": lambda x, i, w: x @ w.t() + torch.addmm(w[:, 1], x, w.t()) + torch.mm(x, w.t()),
    "bmm": lambda x, i, w: (
        torch.bmm(x.view(-1, 2, 4), x.view(-1, 4, 2)).flatten(1) + (x.view(-1, 2, 4) @ w[0, :4])[:, [0]]
    ),
    "norms": lambda x, i, w: (
        F.layer_norm(x, (8,), w[0], w[1], 1e-3) + F.rms_norm(x, (8,), w[2], 1e-3) + F.layer_norm(x, (8,))
    ),
    "rms default eps": lambda x, i, w: F.rms_norm(x * 1e-3, (8,)),
    "softmax": lambda x, i, w: x.softmax(-1) + torch.softmax(x.view(-1, 2, 4), 1).flatten(1),
    "reductions": lambda x, i, w: (
        x.sum(-1, keepdim=True) + x.mean(1, keepdim=True) + x.amax(-1, keepdim=True) - x.amin(1, True)
    ),
    "variance": lambda x, i, w: (
        x.var(-1, keepdim=True) + x.var(1, unbiased=False, keepdim=True) + x.std(-1, keepdim=True)
    ),
    "norm": lambda x, i, w: x / x.norm(dim=-1, keepdim=True) + torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "cumsum": lambda x, i, w: x.cumsum(-1),
    "lookups": lambda x, i, w: x * F.embedding(i % 6, w) + w[i % 6] + torch.index_select(w, 0, i % 6),
    "gather": lambda x, i, w: x + w[0][None].gather(1, (i % 8)[None].long())[0][:, None],
    "in place": lambda x, i, w: (x * 2).mul_(3).add_(w[0]).clamp_(max=1.5),
    "parts": lambda x, i, w: parts(x),
}


def parts(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.shape[0], 2, 4)
    out[..., :1] = x[:, :2, None]
    out[..., 1:] = x[:, 2:].view(-1, 2, 3)
    return out


@pytest.mark.parametrize("name", OPS)
def test_same_as_torch(name: str) -> None:
    module, params = imported(OPS[name])
    for n in (1, 2, 7):  # 1: export assumes at least two rows, the imported types do not
        x = torch.randn(n, 8, generator=torch.Generator().manual_seed(n))
        i = torch.arange(n, dtype=torch.int32)
        want = OPS[name](x, i, Wrapped(OPS[name]).w).numpy()
        (got,) = run(module, "step", {"x": x.numpy(), "i": i.numpy()}, params, {"N": n})
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_sixteen_bit_arithmetic_rounds_where_torch_rounds() -> None:
    def fn(x: torch.Tensor, i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ((x * 0.3 + 1) * x.float().cos().to(x.dtype)).float()

    module, params = imported(fn, torch.bfloat16)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    i = torch.arange(6, dtype=torch.int32)
    (got,) = run(module, "step", {"x": to_numpy(x), "i": i.numpy()}, params, {"N": 6})
    np.testing.assert_array_equal(got, fn(x, i, torch.zeros(1)).numpy())


def seen_twice(x: torch.Tensor, i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x * 2
    view = y[:, :4]
    y.mul_(3)
    return y[:, 4:] + view  # torch's view shows the write


REFUSED: dict[str, tuple[Fn, str]] = {
    "write seen through a view": (seen_twice, "seen through another view"),
    "write to an input": (lambda x, i, w: x.mul_(2), "not its own"),
    "unknown operation": (lambda x, i, w: torch.fft.fft(x).real, "has no translation"),
    "two index tensors": (lambda x, i, w: w[i % 6, i % 8], "several index tensors"),
    "experts": (lambda x, i, w: x.topk(2, dim=-1).values, "aten.topk.default has no translation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    fn, message = REFUSED[name]
    with pytest.raises(XllmError, match=message) as e:
        imported(fn)
    assert e.value.kind == "unsupported" and "aten." in e.value.message
