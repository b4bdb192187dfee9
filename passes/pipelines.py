"""The pipelines that targets start from. The order is the documentation: every line says why it stands where it stands.
Which target runs which, under what names, is `xllm_compiler/targets/`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from xllm_compiler.passes.quantize.forms import QuantForm


@dataclass(frozen=True, slots=True)
class Halves:
    """A target's passes, and between them the place where passes that quantize stand. `before`: what the loss of a form
    is measured against is the module as it is then."""

    before: tuple[str, ...]
    after: tuple[str, ...]

    def plain(self, *between: str) -> tuple[str, ...]:
        """All passes, with `between` in the middle."""
        return (*self.before, *between, *self.after)

    def quantized(self, form: QuantForm, wide: Sequence[str] = ()) -> tuple[str, ...]:
        """With the layers' weights, and where the form says so their inputs, quantized; those weights to 8 bits that
        read a checkpoint tensor of the names `wide`."""
        return self.plain(*form.passes(wide))  # after the fusions, which see plain linears and leave a residual stream
        #                                        in few ops; what they stacked has one layout. Rows that several layers
        #                                        read become one in the clean-up


BEFORE: Final[tuple[str, ...]] = (
    "import-clean",  # what export leaves behind (unit batch dim, no-op casts) would hide every later pattern
    "fold",  # shorter reshape and cast chains: one spelling per idea for the matchers below
    "cse",  # the rotary table and masks are spelled out once per layer; afterwards there is one of each
    "canonicalise",  # models spell out norms, rotary and repeats by hand; everything below matches ops, not spellings
    "tabulate-positions",  # needs nn.rope in place, so that cos and sin are seen as functions of %pos alone
    "fix(fold,cse,dce,canonicalise)",  # half-used chains must be gone, since fusions count users; and what became equal
    #                                    may be one op now, with the single user that a canonical form asks for
    "fuse-epilogue{act=false,residual=false}",  # an explicit bias add must be inside the linear before linears merge
    "fuse-glu",  # before fuse-epilogue takes the activation into the gate's own linear and hides the pair
    "fuse-qkv",  # before residuals: merges by use in attention, so the mlp of a parallel block is left alone
    "fuse-kv-append",  # wants exactly the slices that fuse-qkv has just made, or the model's own
    "fuse-epilogue",  # residual sums go into the linear that produced one side: the sum costs no pass over memory, and
    #                   the rms_norm that follows stays alone; add_rms_norm would be one kernel more per layer
    "fuse-add-norm",  # so only sums that no linear could take (post-norms, embeddings, all-reduced) remain for it
)
AFTER: Final[tuple[str, ...]] = (
    "return-block-max",  # after the fusions, which count users: the maxima are one more of the logits
    "fix(fold,cse,dce)",  # drops the transposed, sliced and reshaped left-overs before bytes are planned
    "fuse-norm-rows",  # after cse, which makes rows that several layers read one; where no rows are quantized, nothing
    "split-attention",  # asks for bytes to work in, so before they are planned and after what counts results
    "assign-streams",  # before bytes are planned: a place that is free in one order of the streams may be in use in
    #                    another. One CPU process has no collectives, so this only names the stage
    "plan-memory",  # last: every value that still exists gets its place
)
