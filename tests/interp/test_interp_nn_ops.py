"""nn.* and kv.* reference meanings against torch and transformers, which know nothing of ours."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from xllm_compiler.interp.run import run
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Builder, Module, Op
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.semantics import OUR_DTYPE, Array, state_zeros
from xllm_compiler.ir.types import Kv, Tensor
from xllm_compiler.ir.verify import verify

F = torch.nn.functional
BF16 = ml_dtypes.bfloat16


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def t(x: Array) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float64) if x.dtype == BF16 else x)


def call(cls: type[Op], given: dict[str, Array], precise: bool = False, **attrs: Any) -> list[Array]:
    module = Module()
    func = module.add_func("f")
    args = {k: func.add_arg(k, Tensor(OUR_DTYPE[a.dtype], a.shape)) for k, a in given.items()}
    func.set_returns(Builder.at_end(func).create(cls, **args, **attrs).results)
    verify(module)
    return run(module, "f", given, precise=precise)


def close(got: Array, want: torch.Tensor, tol: float = 2e-6) -> None:
    """Near in f32; in bf16 within half a last place of the exact value, which is what one rounding may cost."""
    exact = want.double().numpy()
    if got.dtype == BF16:
        step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
        assert np.max((np.abs(got.astype(np.float64) - exact) - 4e-6) / step) <= 0.501
    else:
        np.testing.assert_allclose(got, exact, rtol=tol, atol=tol)


ACTS = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("act", ACTS)
def test_linear(act: str, dtype: Any) -> None:
    x, w, bias, residual = (
        normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(3, 5, 16), (6, 16), (6,), (3, 5, 6)])
    )
    args = {"x": x, "w": w, "bias": bias, "residual": residual}
    want = ACTS[act](F.linear(t(x).double(), t(w).double(), t(bias).double())) + t(residual)
    close(call(ops.Linear, args, act=act)[0], want, 1e-5)
    np.testing.assert_allclose(call(ops.Linear, args, act=act, precise=True)[0], want.numpy(), rtol=1e-12, atol=1e-12)
    close(call(ops.Linear, {"x": x, "w": w})[0], F.linear(t(x).double(), t(w).double()), 1e-5)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_linear_glu(dtype: Any) -> None:
    x, w, bias = normal(5, 16, dtype=dtype), normal(12, 16, seed=1, dtype=dtype), normal(12, seed=2, dtype=dtype)
    for act, fn in ACTS.items():
        y = F.linear(t(x).double(), t(w).double(), t(bias).double())
        close(call(ops.LinearGlu, {"x": x, "w": w, "bias": bias}, act=act)[0], fn(y[:, :6]) * y[:, 6:], 1e-5)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_norms(dtype: Any) -> None:
    x, w, b = normal(7, 16, dtype=dtype), normal(16, seed=1, dtype=dtype), normal(16, seed=2, dtype=dtype)
    exact = t(x).double()
    want = F.rms_norm(exact, (16,), eps=1e-3)
    close(call(ops.RmsNorm, {"x": x}, eps=1e-3)[0], want)
    close(call(ops.RmsNorm, {"x": x, "w": w}, eps=1e-3)[0], want * t(w))
    close(call(ops.RmsNorm, {"x": x, "w": w}, eps=1e-3, offset=1.0)[0], want * (t(w) + 1))
    want = F.layer_norm(exact, (16,), t(w).double(), t(b).double(), eps=1e-3)
    close(call(ops.LayerNorm, {"x": x, "w": w, "b": b}, eps=1e-3)[0], want, 1e-5)
    close(call(ops.LayerNorm, {"x": x}, eps=1e-3)[0], F.layer_norm(exact, (16,), eps=1e-3), 1e-5)


def test_rms_norm_is_what_transformers_does() -> None:
    x, w = normal(7, 16), normal(16, seed=1)
    norm = LlamaRMSNorm(16, eps=1e-5)
    norm.weight.data = torch.from_numpy(w)
    with torch.no_grad():
        want = norm(torch.from_numpy(x))
    close(call(ops.RmsNorm, {"x": x, "w": w}, eps=1e-5)[0], want)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_add_rms_norm_is_the_unfused_pair(dtype: Any) -> None:
    x, res, w = normal(7, 16, dtype=dtype), normal(7, 16, seed=1, dtype=dtype), normal(16, seed=2, dtype=dtype)
    y, total = call(ops.AddRmsNorm, {"x": x, "res": res, "w": w}, eps=1e-5)
    module = Module()
    func = module.add_func("f")
    a, b, c = (func.add_arg(k, Tensor(OUR_DTYPE[v.dtype], v.shape)) for k, v in (("x", x), ("res", res), ("w", w)))
    build = Builder.at_end(func)
    s = build.create(ops.Add, a, b).result
    func.set_returns([build.create(ops.RmsNorm, s, c, eps=1e-5).result, s])
    for got, want in zip((y, total), run(module, "f", {"x": x, "res": res, "w": w}), strict=True):
        np.testing.assert_array_equal(got, want)
    close(total, t(x).double() + t(res).double())


def rotary(n: int, half: int, base: float = 100.0) -> tuple[Array, Array]:
    angle = np.outer(np.arange(n), base ** (-np.arange(half) / half))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def test_rope_half_is_what_transformers_does() -> None:
    x, (cos, sin) = normal(5, 3, 8), rotary(5, 4)
    q = torch.from_numpy(x).transpose(0, 1)[None]
    full = [torch.from_numpy(np.concatenate([v, v], -1))[None] for v in (cos, sin)]
    want = apply_rotary_pos_emb(q, q, *full)[0][0].transpose(0, 1)
    close(call(ops.Rope, {"x": x, "cos": cos, "sin": sin})[0], want)
    # Partial rotary: the rest of the head passes through.
    wide = np.concatenate([x, normal(5, 3, 2, seed=1)], -1)
    got = call(ops.Rope, {"x": wide, "cos": cos, "sin": sin})[0]
    close(got[..., :8], want)
    np.testing.assert_array_equal(got[..., 8:], wide[..., 8:])


def test_rope_interleaved_is_a_complex_rotation() -> None:
    x, (cos, sin) = normal(5, 3, 10), rotary(5, 4)
    z = torch.view_as_complex(torch.from_numpy(x[..., :8]).reshape(5, 3, 4, 2).contiguous())
    turned = z * torch.complex(torch.from_numpy(cos), torch.from_numpy(sin))[:, None]
    got = call(ops.Rope, {"x": x, "cos": cos, "sin": sin}, style="interleaved")[0]
    close(got[..., :8], torch.view_as_real(turned).reshape(5, 3, 8))
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


def test_embedding() -> None:
    w, ids = normal(11, 4, dtype=BF16), np.array([3, 0, 10, 3], np.int32)
    np.testing.assert_array_equal(call(ops.Embedding, {"ids": ids, "w": w})[0], w[ids])
    for bad in (-1, 11):
        with pytest.raises(IrError, match=f"index {bad} is out of range"):
            call(ops.Embedding, {"ids": np.array([bad], np.int32), "w": w})


# KV cache.

PAGE = 4


class Pool:
    """A cache of two requests built step by step, and the plain list of what was written: the oracle's view."""

    def __init__(self, dtype: Any, heads: int = 2, k_dim: int = 8, v_dim: int = 6) -> None:
        self.type = Kv(OUR_DTYPE[np.dtype(dtype)], heads, k_dim, v_dim, PAGE, 9)
        self.dtype = dtype
        self.cache = state_zeros(self.type, {})
        self.cache[:] = np.nan  # what is read without being written must show
        self.table = np.array([[7, 2, 0, -1], [1, 8, -1, -1], [5, -1, -1, -1]], np.int32)
        self.seen: list[list[tuple[Array, Array]]] = [[], [], []]

    def tokens(self, counts: list[int]) -> dict[str, Array]:
        pos = [len(self.seen[b]) + i for b, c in enumerate(counts) for i in range(c)]
        return {
            "pos": np.array(pos, np.int32),
            "seq": np.repeat(np.arange(3), counts).astype(np.int32),
            "start": np.cumsum([0, *counts]).astype(np.int32),
            "table": self.table,
        }

    def run(self, build: Any, given: dict[str, Array]) -> list[Array]:
        module = Module()
        func = module.add_func("f")
        kv = func.add_arg("kv", self.type)
        args = {k: func.add_arg(k, Tensor(OUR_DTYPE[a.dtype], a.shape)) for k, a in given.items()}
        out = build(Builder.at_end(func), kv, args)
        func.set_returns([out[0], *out[1:]], {0: kv})
        verify(module)
        before = self.cache.copy()
        results = run(module, "f", {"kv": self.cache, **given})
        assert self.cache.tobytes() == before.tobytes()  # inputs are not changed
        self.cache = results[0]
        return results[1:]

    def remember(self, tok: dict[str, Array], k: Array, v: Array) -> None:
        for i, b in enumerate(tok["seq"]):
            self.seen[b].append((k[i], v[i]))

    def oracle(
        self, tok: dict[str, Array], q: Array, window: int, softcap: float, sinks: Array | None, scale: float
    ) -> torch.Tensor:
        """Per token, in f64: scores over its own request's positions up to its own."""
        out = []
        group = q.shape[1] // self.type.heads
        for n, (b, p) in enumerate(zip(tok["seq"], tok["pos"], strict=True)):
            first = max(0, p - window + 1) if window else 0
            ks = torch.stack([t(k).double() for k, _ in self.seen[b][first : p + 1]]).repeat_interleave(group, 1)
            vs = torch.stack([t(v).double() for _, v in self.seen[b][first : p + 1]]).repeat_interleave(group, 1)
            s = torch.einsum("hd,jhd->hj", t(q[n]).double(), ks) * scale
            if softcap:
                s = torch.tanh(s / softcap) * softcap
            if sinks is not None:
                s = torch.cat([s, t(sinks).double()[:, None]], 1)
            w = torch.softmax(s, 1)[:, : len(ks)]
            out.append(torch.einsum("hj,jhd->hd", w, vs))
        return torch.stack(out)


STEPS = [[3, 5, 0], [1, 1, 1], [6, 0, 2], [1, 2, 0]]


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(0, 0.0, False), (3, 0.0, False), (0, 2.0, False), (0, 0.0, True), (4, 1.5, True)]
)
def test_write_and_attend_over_steps(window: int, softcap: float, sinks: bool, dtype: Any) -> None:
    pool = Pool(dtype)
    for step, counts in enumerate(STEPS):
        tok, n = pool.tokens(counts), sum(counts)
        k, v, q = (normal(n, h, d, seed=step * 3 + i, dtype=dtype) for i, (h, d) in enumerate([(2, 8), (2, 6), (4, 8)]))
        extra = {"sinks": normal(4, seed=9, dtype=dtype)} if sinks else {}

        def build(b: Builder, kv: Any, a: dict[str, Any]) -> list[Any]:
            new = b.create(ops.KvWrite, kv, a["k"], a["v"], a["pos"], a["seq"], a["table"]).result
            more = {"sinks": a["sinks"]} if "sinks" in a else {}
            tokens = (a["pos"], a["seq"], a["start"], a["table"])
            attrs = {"scale": 0.3, "window": window, "softcap": softcap}
            return [new, b.create(ops.KvAttend, new, a["q"], *tokens, **more, **attrs).result]

        (got,) = pool.run(build, {"k": k, "v": v, "q": q, **tok, **extra})
        pool.remember(tok, k, v)
        close(got, pool.oracle(tok, q, window, softcap, extra.get("sinks"), 0.3), 1e-5)


def test_attend_is_sdpa() -> None:
    pool = Pool(np.float32, heads=2, k_dim=8, v_dim=8)
    tok = pool.tokens([11, 0, 0])
    k, v, q = normal(11, 2, 8), normal(11, 2, 8, seed=1), normal(11, 6, 8, seed=2)

    def build(b: Builder, kv: Any, a: dict[str, Any]) -> list[Any]:
        new = b.create(ops.KvWrite, kv, a["k"], a["v"], a["pos"], a["seq"], a["table"]).result
        return [
            new,
            b.create(ops.KvAttend, new, a["q"], a["pos"], a["seq"], a["start"], a["table"], scale=8**-0.5).result,
        ]

    (got,) = pool.run(build, {"k": k, "v": v, "q": q, **tok})
    heads = [torch.from_numpy(x).transpose(0, 1)[None] for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    close(got, want[0].transpose(0, 1), 1e-5)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("full", [True, False])
def test_append_is_the_unfused_chain(style: str, full: bool) -> None:
    """kv.append in f32 equals slices, rms_norm, rope and kv.write of the separate ops, bit for bit."""
    n, hq, hk, dk, dv = 5, 4, 2, 8, 6
    given = {"qkv": normal(n, (hq + hk) * dk + hk * dv)}
    if full:
        cos, sin = rotary(n, 3)
        given |= {"cos": cos, "sin": sin, "qw": normal(dk, seed=1), "kw": normal(dk, seed=2)}
    fused, plain = Pool(np.float32), Pool(np.float32)
    tok = fused.tokens([3, 2, 0])
    given |= tok

    def build_fused(b: Builder, kv: Any, a: dict[str, Any]) -> list[Any]:
        opt = {k: a[k] for k in ("cos", "sin", "qw", "kw") if k in a}
        attrs = {"q_heads": hq, "style": style, "eps": 1e-5, "offset": 1.0}
        return list(b.create(ops.KvAppend, kv, a["qkv"], a["pos"], a["seq"], a["table"], **opt, **attrs).results)

    def build_plain(b: Builder, kv: Any, a: dict[str, Any]) -> list[Any]:
        parts, at = [], 0
        for heads, dim, w in ((hq, dk, "qw"), (hk, dk, "kw"), (hk, dv, "")):
            cut = b.create(ops.Slice, a["qkv"], axis=1, start=at, stop=at + heads * dim).result
            at += heads * dim
            v = b.create(ops.Reshape, cut, shape=(n, heads, dim)).result
            if w in a:
                v = b.create(ops.RmsNorm, v, a[w], eps=1e-5, offset=1.0).result
            if w and "cos" in a:
                v = b.create(ops.Rope, v, a["cos"], a["sin"], style=style).result
            parts.append(v)
        q, k, v = parts
        return [b.create(ops.KvWrite, kv, k, v, a["pos"], a["seq"], a["table"]).result, q]

    np.testing.assert_array_equal(fused.run(build_fused, given)[0], plain.run(build_plain, given)[0])
    np.testing.assert_array_equal(fused.cache, plain.cache)


def test_unmapped_pages_are_an_error() -> None:
    pool = Pool(np.float32)
    tok = pool.tokens([0, 9, 0])  # request 1 has two pages of four

    def build(b: Builder, kv: Any, a: dict[str, Any]) -> list[Any]:
        return [b.create(ops.KvWrite, kv, a["k"], a["v"], a["pos"], a["seq"], a["table"]).result]

    tok.pop("start")
    with pytest.raises(IrError, match="position 8 of request 1 has no page"):
        pool.run(build, {"k": normal(9, 2, 8), "v": normal(9, 2, 6), **tok})


@pytest.mark.parametrize("n, block", [(1, 4), (8, 4), (9, 4), (130, 64)])
def test_block_max(n: int, block: int) -> None:
    """Against numpy's max of each slice, which is NaN where a value is."""
    x = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    x[1, n // 2], x[2] = np.nan, -np.inf
    want = np.stack([x[:, at : at + block].max(axis=1) for at in range(0, n, block)], axis=1)
    np.testing.assert_array_equal(call(ops.BlockMax, {"x": x}, block=block)[0], want)
