"""What the phases of a compile found, as a manifest. Owns that translation; the target's part is its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xllm_compiler.artifact import FORMAT, DimRange, Limits, Manifest, Model, Target, Weights
from xllm_compiler.driver.key import Request
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.targets import Lowered

if TYPE_CHECKING:
    from xllm_compiler.frontend.model import CheckpointInfo


def build_manifest(
    request: Request, module: Module, info: CheckpointInfo, ends: tuple[int, ...], lowered: Lowered
) -> Manifest:
    """The manifest, but for files and id, which the writer knows. `ends`: the tokens that end a text."""
    options = request.options
    dims = {}
    for symbol in module.scope.symbols.values():
        if symbol.lo is None or symbol.hi is None:
            raise XllmError("internal", f"dim {symbol.name} has no range")
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
            pooling=info.pooling,
        ),
        target=Target(options.target.name, lowered.levels, lowered.files),
        limits=Limits(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_logits=options.max_num_logits,
        ),
        dims=dims,
        states=lowered.states,
        functions=lowered.functions,
        weights=Weights(lowered.weight_bytes, lowered.weights),
        files={},
        key=request.factors.key(),
    )
