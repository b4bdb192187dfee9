"""What the phases of a compile found, as a manifest. Owns that translation; the target's part is its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from xllm_compiler.artifact import (
    FORMAT,
    OUTPUTS,
    DimRange,
    KvLayer,
    KvPlan,
    Limits,
    Manifest,
    Memory,
    Model,
    Target,
    TensorSpec,
    Weights,
)
from xllm_compiler.driver.key import Request
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module, Value
from xllm_compiler.ir.types import Kv, Tensor
from xllm_compiler.options import PAGE_TOKENS
from xllm_compiler.targets import Lowered

if TYPE_CHECKING:
    from xllm_compiler.frontend.model import CheckpointInfo


def build_manifest(
    request: Request, module: Module, info: CheckpointInfo, ends: tuple[int, ...], lowered: Lowered
) -> Manifest:
    """The manifest, but for files and id, which the writer knows. `ends`: the tokens that end a text."""
    options = request.options
    func = module.func("step")
    dims = {}
    for symbol in module.scope.symbols.values():
        if symbol.lo is None or symbol.hi is None:
            raise XllmError("internal", f"dim {symbol.name} has no range", where="@step")
        dims[symbol.name] = DimRange(symbol.lo, symbol.hi, symbol.why)
    return Manifest(
        format=FORMAT,
        id="",
        model=Model(
            architecture=info.architecture,
            name=options.name,
            vocab_size=info.vocab_size,
            hidden_size=info.hidden_size,
            layers=info.layers,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            eos_token_ids=ends,
            bos_token_id=info.bos_token_id,
        ),
        target=Target(options.target.name, PAGE_TOKENS, lowered.levels, lowered.files),
        limits=Limits(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_logits=options.max_num_logits,
        ),
        dims=dims,
        inputs=tuple(_spec(value.name, value) for value in _tensors(func.args)),
        outputs=tuple(_spec(name, value) for name, value in zip(OUTPUTS, _tensors(func.returns), strict=False)),
        memory=Memory(str(lowered.arena), str(lowered.logits), _kv_plan(func)),
        weights=Weights(lowered.weight_bytes, lowered.weights),
        programs=lowered.programs,
        files={},
        key=request.factors.key(),
    )


def _kv_plan(func: Func) -> KvPlan:
    caches = [arg.kv for arg in func.args if isinstance(arg.type, Kv)]
    pages = {kv.page for kv in caches}
    if pages - {PAGE_TOKENS}:
        raise XllmError("internal", f"KV pages of {sorted(pages)} tokens, the format says {PAGE_TOKENS}")
    return KvPlan(PAGE_TOKENS, tuple(KvLayer(kv.page_bytes, kv.heads, kv.k_dim, kv.v_dim) for kv in caches))


def _tensors(values: Iterable[Value]) -> list[Value]:
    return [value for value in values if isinstance(value.type, Tensor)]


def _spec(name: str, value: Value) -> TensorSpec:
    return TensorSpec(name, value.dtype, tuple(str(dim) for dim in value.shape))
