"""The cost model against numbers worked out by hand, and what must hold for any graph."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_text import TWO_STREAMS, model_text

from xllm_compiler.analysis.cost import Costs, estimate
from xllm_compiler.analysis.machine import Machine
from xllm_compiler.analysis.weights import weight_roots
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Op
from xllm_compiler.ir.cost import Amounts
from xllm_compiler.ir.ops import Dequantize, Embedding, Linear, LinearGlu, Take
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.report.sizes import complete
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.testing.graphs import random_module

DECODE = {"N": 3, "B": 3, "S": 3, "P": 100, "context": 40}
PREFILL = {"N": 10, "B": 2, "S": 2, "P": 100, "context": 0}


def only(func: Func, result: str) -> Op:
    return next(op for op in func.ops if op.results and op.results[0].name == result)


def numbers(result: str, dims: dict[str, int], text: str = "") -> Amounts:
    func = parse_module(text or model_text(1), "m.xir").func()
    return Costs(func).of[only(func, result)].at(dims)


def one_op(line: str, args: str, result: str) -> Amounts:
    head = "xir 1 stage=graph\ndim N in [1, 512]\n"
    text = f"{head}func @step({args}) -> ({result}) {{\n  {line}\n  return %y\n}}\n"
    return numbers("y", {"N": 6}, text)


def test_linear_is_two_operations_per_weight_and_row() -> None:
    got = numbers("q0", DECODE)
    assert got == Amounts(read=3 * 64 * 2, written=3 * 64 * 2, weights=64 * 64 * 2, flops=2 * 3 * 64 * 64, free=False)


def test_bias_residual_and_activation_are_one_operation_each() -> None:
    args = "%x: f32[N, 8], %w: f32[16, 8], %b: f32[16], %r: f32[N, 16]"
    got = one_op("%y = nn.linear(%x, %w, bias=%b, residual=%r, act=silu) : f32[N, 16]", args, "f32[N, 16]")
    assert got.flops == 2 * 6 * 8 * 16 + 3 * 6 * 16
    assert got.read == 4 * (6 * 8 + 16 * 8 + 16 + 6 * 16) and got.written == 4 * 6 * 16


def test_glu_is_two_products_an_activation_and_their_product() -> None:
    got = one_op("%y = nn.linear_glu(%x, %w) : f32[N, 16]", "%x: f32[N, 8], %w: f32[32, 8]", "f32[N, 16]")
    assert got.flops == 2 * (2 * 6 * 8 * 16) + 2 * 6 * 16


def test_a_gather_reads_rows_and_not_the_table() -> None:
    assert numbers("x0", DECODE) == Amounts(read=3 * 4, weights=3 * 64 * 2, written=3 * 64 * 2, free=False)


def test_taking_rows_of_an_activation_reads_those_rows() -> None:
    got = numbers("last", {**PREFILL, "S": 2})
    assert got == Amounts(read=2 * 64 * 2 + 2 * 4, written=2 * 64 * 2, free=False)


def test_views_parameters_and_compile_time_values_are_free() -> None:
    assert numbers("qh0", DECODE) == Amounts()
    assert numbers("wq0", DECODE) == Amounts()


QUANTIZED = """xir 1 stage=graph
dim N in [1, 512]

func @step(%x: bf16[N, 64]) -> (bf16[N, 20]) {
  %w = param(name="w") : bf16[40, 64]
  %stored, %scales, %zeros = quant.weight(%w, format="qBITSg32z") : u8[40, 64], f16[40, 2], u8[40, 2]
  %back = quant.dequantize(%stored, %scales, zeros=%zeros, format="qBITSg32z") : bf16[40, 64]
  %b = param(name="b") : bf16[40]
  %rows, %scale, %sums = quant.rows(%x, group=32ROWS
  %first = quant.linear(%rows, %scale, %sums, %stored, %scales, zeros=%zeros, bias=%b, format="qBITSg32z", act=silu)
  %y = quant.linear_glu(%rows, %scale, %sums, %stored, %scales, zeros=%zeros, format="qBITSg32z") : bf16[N, 20]
  return %y
}
"""


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_layers_read_what_is_stored(bits: int) -> None:
    """Two 4-bit values to a byte, an f16 scale and a zero point of a byte for 32 of them."""
    rows = ", by_group=true) : i8[N, 64], f32[N, 2], i32[N, 2]" if bits == 8 else ") : i8[N, 64], f32[N], i32[N, 2]"
    text = QUANTIZED.replace("BITS", str(bits)).replace("act=silu)", "act=silu) : bf16[N, 40]").replace("ROWS", rows)
    scales = 2 if bits == 8 else 1  # of a row
    stored = 40 * 64 * bits // 8 + 40 * 2 * (2 + 1)
    activations = 6 * 64 + 6 * scales * 4 + 6 * 2 * 4
    linear = numbers("first", {"N": 6}, text)
    assert (linear.weights, linear.read, linear.written) == (stored + 40 * 2, activations, 6 * 40 * 2)
    sums = 2 * 64 + (1 + scales) * 2 if bits == 8 else 2 * (64 + 2)
    assert linear.flops == 6 * 40 * sums + 2 * 6 * 40
    glu = numbers("y", {"N": 6}, text)
    assert (glu.weights, glu.read, glu.written) == (stored, activations, 6 * 20 * 2)
    assert glu.flops == 6 * 40 * sums + 2 * 6 * 20
    made = numbers("rows", {"N": 6}, text)
    assert (made.read, made.written, made.flops) == (6 * 64 * 2, activations, 4 * 6 * 64)
    assert numbers("stored", {"N": 6}, text) == numbers("back", {"N": 6}, text) == Amounts()


def test_a_widened_weight_is_read_as_it_is_stored() -> None:
    text = """xir 1 stage=graph
dim N in [1, 512]

func @step(%x: bf16[N, 64]) -> (bf16[N, 40]) {
  %w = param(name="w") : bf16[40, 64]
  %stored, %scales, %zeros = quant.weight(%w, format="q4g32z") : u8[40, 64], f16[40, 2], u8[40, 2]
  %back = quant.dequantize(%stored, %scales, zeros=%zeros, format="q4g32z") : bf16[40, 64]
  %y = nn.linear(%x, %back) : bf16[N, 40]
  return %y
}
"""
    got = numbers("y", {"N": 6}, text)
    assert (got.weights, got.read, got.flops) == (40 * 64 // 2 + 40 * 2 * (2 + 1), 6 * 64 * 2, 2 * 6 * 40 * 64)


def test_weights_on_grids_are_read_as_they_are_stored() -> None:
    """Two values to a byte, a byte for 32 of them, an f32 scale for each row."""
    text = """xir 1 stage=graph
dim N in [1, 512]

func @step(%x: bf16[N, 64], %ids: i32[N]) -> (bf16[N, 40], bf16[N, 40], bf16[N, 64]) {
  %w = param(name="w") : bf16[40, 64]
  %stored, %scales = quant.weight(%w, format="q4grid32") : u8[40, 64], f32[40, 1]
  %back = quant.dequantize(%stored, %scales, format="q4grid32") : bf16[40, 64]
  %y = nn.linear(%x, %back) : bf16[N, 40]
  %rows, %scale, %sums = quant.rows(%x) : i8[N, 64], f32[N], i32[N, 1]
  %z = quant.linear(%rows, %scale, %sums, %stored, %scales, format="q4grid32") : bf16[N, 40]
  %e = nn.embedding(%ids, %back) : bf16[N, 64]
  return %y, %z, %e
}
"""
    for name, rows in (("y", 40), ("z", 40), ("e", 6)):
        assert numbers(name, {"N": 6}, text).weights == rows * (32 + 2 + 4), name


def test_rows_of_a_quantized_table() -> None:
    text = """xir 1 stage=graph
dim N in [1, 512]

func @step(%ids: i32[N]) -> (bf16[N, 64]) {
  %w = param(name="w") : bf16[40, 64]
  %stored, %scales = quant.weight(%w, format="q4g32") : u8[40, 64], f16[40, 2]
  %back = quant.dequantize(%stored, %scales, format="q4g32") : bf16[40, 64]
  %y = nn.embedding(%ids, %back) : bf16[N, 64]
  return %y
}
"""
    got = numbers("y", {"N": 6}, text)
    assert (got.weights, got.read, got.written) == (6 * (32 + 2 * 2), 6 * 4, 6 * 64 * 2)


def test_an_operand_that_is_used_twice_is_read_once() -> None:
    got = one_op("%y = t.mul(%x, %x) : f32[N, 8]", "%x: f32[N, 8]", "f32[N, 8]")
    assert (got.read, got.written, got.flops) == (6 * 8 * 4, 6 * 8 * 4, 6 * 8)


def test_a_slice_reads_its_part_only() -> None:
    got = one_op("%y = t.slice(%x, axis=1, start=2, stop=5) : f32[N, 3]", "%x: f32[N, 8]", "f32[N, 3]")
    assert (got.read, got.written, got.flops) == (6 * 3 * 4, 6 * 3 * 4, 0)


def test_kv_write_writes_the_tokens_and_reads_one_page_index_each() -> None:
    got = numbers("cache0", DECODE)
    assert got.kv_written == 3 * 2 * (16 + 16) * 2
    assert got.read == 3 * 2 * 16 * 2 * 2 + 3 * 4 + 3 * 4 + 3 * 4  # k and v, pos, seq, a page index for each token


def test_attention_of_a_decode_step() -> None:
    """3 requests of 40 tokens and the new one: 41 rows each, of 2 heads with 16 + 16 bf16 numbers."""
    got = numbers("a0", DECODE)
    assert got.kv_read == 3 * 41 * 2 * 32 * 2
    assert got.flops == 4 * 3 * 41 * (2 * 16 + 2 * 16 + 5)
    assert got.read == 3 * 4 * 16 * 2 + 3 * 4 + 3 * 4 + 4 * 4 + 3 * 3 * 4  # q, pos, seq, start, 3 pages a request


def test_attention_of_a_prefill_step_is_causal() -> None:
    """2 requests of 5 tokens: 1 + 2 + 3 + 4 + 5 pairs each."""
    got = numbers("a0", PREFILL)
    assert got.flops == 4 * 2 * 15 * 69 and got.kv_read == 2 * 5 * 2 * 32 * 2


def test_a_window_bounds_what_attention_reads() -> None:
    text = model_text(1).replace("scale=0.25)", "scale=0.25, window=8)")
    got = numbers("a0", DECODE, text)
    assert got.kv_read == 3 * 8 * 2 * 32 * 2 and got.flops == 4 * 3 * 8 * 69


def test_a_ring_all_reduce_sends_twice_what_it_lacks() -> None:
    got = numbers("f", {"N": 6}, TWO_STREAMS)
    assert got.comm == 2 * 3 * (6 * 256 * 4) // 4 and got.hops == 6
    machine = Machine("m", flops=1e12, bandwidth=1e12, launch=0.0, link=1e6, hop=1e-3)
    assert estimate(got, machine).seconds == pytest.approx(got.comm / 1e6 + 6e-3)
    assert estimate(got, machine).limit == "link"
    assert numbers("c", {"N": 6}, TWO_STREAMS) == Amounts()


@pytest.mark.parametrize(
    ("op", "sent", "hops", "flops", "written"),
    [  # of x: f32[N, 8] at N=6, 192 bytes, on 4 ranks
        ("all_reduce_start(%x, group=@g) : !future<f32[N, 8]>", 2 * 3 * 48, 6, 3 * 12, 192),
        ("all_reduce_start(%x, group=@g, kind=max) : !future<f32[N, 8]>", 2 * 3 * 48, 6, 3 * 12, 192),
        ("reduce_scatter_start(%x, group=@g, axis=1) : !future<f32[N, 2]>", 3 * 48, 3, 3 * 12, 48),
        ("all_gather_start(%x, group=@g, axis=0) : !future<f32[4*N, 8]>", 3 * 192, 3, 0, 4 * 192),
        ("all_to_all_start(%x, group=@g, split=1, concat=0) : !future<f32[4*N, 2]>", 3 * 48, 3, 0, 192),
        ("broadcast_start(%x, group=@g, root=3) : !future<f32[N, 8]>", 2 * 192, 2, 0, 192),
    ],
)
def test_collectives_send_what_their_algorithms_send(op: str, sent: int, hops: int, flops: int, written: int) -> None:
    head = "xir 1 stage=graph\ndim N in [1, 512]\ngroup @tp size=2\ngroup @g size=4 stride=2\n"
    ty = op.partition("<")[2].rstrip(">")
    body = f"%f = comm.{op}\n  %y = comm.wait(%f) : {ty}\n  return %y"
    text = f"{head}func @step(%x: f32[N, 8]) -> ({ty}) {{\n  {body}\n}}\n"
    got = numbers("f", {"N": 6}, text)
    assert got == Amounts(read=192, written=written, flops=flops, comm=sent, hops=hops, free=False)


def test_the_roofline_takes_the_longest_and_a_launch() -> None:
    machine = Machine("m", flops=100.0, bandwidth=10.0, launch=0.5)
    memory = estimate(Amounts(read=30, written=10, flops=100, free=False), machine)
    assert (memory.seconds, memory.limit) == (4.5, "memory")
    assert memory.of_memory == pytest.approx(4 / 4.5) and memory.of_compute == pytest.approx(1 / 4.5)
    assert estimate(Amounts(read=10, flops=500, free=False), machine).limit == "compute"
    assert estimate(Amounts(read=1, flops=1, free=False), machine).limit == "launch"
    assert estimate(Amounts(), machine).seconds == 0.0


def test_costs_of_a_layer_add_up() -> None:
    """One decode step of one request with 40 tokens of context, every op of the layer by hand."""
    costs = Costs(parse_module(model_text(1), "m.xir").func())
    total = costs.total({"N": 1, "B": 1, "S": 0, "P": 9, "context": 40})
    layer = 2 * (64 + 64 * 64 + 2 * 32 * 64 + 64 * 64 + 64 + 2 * 160 * 64 + 64 * 160)
    assert total.weights == layer + 2 * 64 + 2 * 384 * 64  # and a row of the embedding, and all of the head
    products = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 2 * 160 * 64 + 64 * 160
    attention = 4 * 41 * 69
    others = 2 * 4 * 64 + 2 * 64 + 2 * 160  # norms, sums, silu and its product
    assert total.flops == 2 * products + attention + others
    assert total.kv_read == 41 * 2 * 32 * 2 and total.kv_written == 2 * 32 * 2


def test_machines() -> None:
    with pytest.raises(XllmError, match="bandwidth is 0"):
        Machine("m", 1.0, 0.0, 0.0)
    with pytest.raises(XllmError, match="a time is negative"):
        Machine("m", 1.0, 1.0, -1.0)


def _half(op: Op) -> bool:
    return str(op.attrs.get("format", "")).startswith("q4")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 40))
def test_of_any_graph(seed: int, tokens: int) -> None:
    """No cost is negative, more of everything costs more, weights are read at least once, time covers each limit."""
    module = random_module(random.Random(seed).randrange)
    machine = Cpu.machine
    for func in module.funcs.values():
        costs = Costs(func)
        small, large = ({**complete(module, {}), "N": n, "context": 7} for n in (tokens, 2 * tokens))
        gathered = set()
        for op, cost in costs.of.items():
            got, more = cost.at(small), cost.at(large)
            assert min(got.read, got.written, got.weights, got.kv_read, got.kv_written, got.flops, got.comm) >= 0, op
            assert more.bytes >= got.bytes and more.flops >= got.flops, op
            took = estimate(got, machine)
            assert took.seconds >= got.bytes / machine.bandwidth and took.seconds >= got.flops / machine.flops
            assert 0 <= took.of_compute <= 1 and 0 <= took.of_memory <= 1
            if isinstance(op, (Embedding, Take)):
                gathered.add(op)
        read = [v for v in weight_roots(func) if any(u not in gathered and u is not func.ret for u in v.users)]
        # two values of 4 bits, or on grids, are a byte, though their type says u8
        part = {v: 1 + any(_half(u) and v.dtype == "u8" for u in v.users) for v in read}
        whole_read = [v for v in read if all(u.name not in ("t.slice", "t.reshape") for u in v.users)]
        # a linear layer widens a quantized weight as it reads it; whoever else reads it has it stored whole
        whole = sum(
            v.op.values.tensor.nbytes.value // (1 + _half(v.op)) + v.op.scales.tensor.nbytes.value
            if isinstance(v.op, Dequantize) and any(isinstance(u, (Linear, LinearGlu)) for u in v.users)
            else v.tensor.nbytes.value // part[v]
            for v in whole_read
        )
        assert costs.total(small).weights >= whole
