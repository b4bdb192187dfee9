"""Chooses which weights get 8 bits where 4 lose too much.

Weights are ranked by their loss alone at 4 bits, over the bytes that 8 bits cost more. Losses nearly add up: their sum,
scaled to the measured loss, says how many weights to take. The choice is then measured, and more weights are taken
while it is over the limit.
"""

from __future__ import annotations

from typing import Final

from xllm_compiler.analysis.weights import param_names
from xllm_compiler.ir.core import Value
from xllm_compiler.passes.quantize.forms import NARROW, WIDE, QuantForm
from xllm_compiler.quant_eval.compare import Loss
from xllm_compiler.quant_eval.measure import Reference

_SHARE: Final = 0.9  # of the limit: the compiled programs round in other places than the interpreter
_TRIES: Final = 4


def choose(bench: Reference, limit: float) -> tuple[dict[Value, QuantForm], dict[Value, Loss]]:
    """The form of each weight, and the losses alone at 4 bits that decided it.

    All weights together lose less than `limit`, if 8 bits can do that.
    """
    weights = bench.weights
    alone = bench.losses(bench.few, [{w: NARROW} for w in weights])
    goal = limit * _SHARE
    order = sorted(range(len(weights)), key=lambda i: (-alone[i].kl / _bytes(weights[i]), i))
    saved = [alone[i].kl for i in order]
    wide = 0
    for _ in range(_TRIES):
        measured = _measure(bench, weights, order[:wide]).kl
        if measured <= goal or wide == len(weights):
            break
        left = sum(saved[wide:])
        more = wide
        while more < len(weights) and measured * sum(saved[more:]) > goal * left:
            more += 1
        wide = max(wide + 1, more)
    else:
        wide = len(weights)
    taken = set(order[:wide])
    forms = {w: WIDE if i in taken else NARROW for i, w in enumerate(weights)}
    return forms, dict(zip(weights, alone, strict=True))


def names_of(forms: dict[Value, QuantForm]) -> list[str]:
    """Checkpoint names by which the passes know the weights of 8 bits."""
    return [param_names(w)[0] for w, form in forms.items() if form == WIDE]


def _measure(bench: Reference, weights: list[Value], wide: list[int]) -> Loss:
    return bench.losses(bench.ids, [{w: WIDE if i in wide else NARROW for i, w in enumerate(weights)}])[0]


def _bytes(w: Value) -> int:
    """How many bytes more the weight takes in 8 bits than in 4."""
    return (w.tensor.shape[0] * w.tensor.shape[1]).value // 2
