"""What quantization lost: the file in the artifact, and the table that people read. Measures nothing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xllm_compiler.artifact import Contents, Manifest
from xllm_compiler.artifact.strict_json import parse_json
from xllm_compiler.errors import XllmError
from xllm_compiler.quant_eval.compare import Loss, TextLoss

FILE: Final = "quantization.json"
_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class LayerError:
    """What rounding changed of the outputs of the layer whose weight is made of the checkpoint tensors `names`, in the
    weight format `format`: squares added up, relative to the outputs, on the calibration text. `plain`: had each weight
    become the nearest number; `error`: as it was rounded."""

    names: tuple[str, ...]
    format: str
    plain: float
    error: float


@dataclass(frozen=True, slots=True)
class LossReport:
    """The loss of the compiled programs against the unquantized form (`total`, run at `level` of the target), on each
    kind of text, and what changed in each layer. `limit` is what was allowed of the total; None where anything was."""

    form: str
    pipeline: str
    text: str
    level: str
    limit: float | None
    total: Loss
    kinds: dict[str, TextLoss]
    layers: tuple[LayerError, ...]

    def to_json(self) -> str:
        """Canonical text, the same for the same compile. KL in nats, to three digits; a loss beyond numbers is null."""
        value = {
            "form": self.form,
            "pipeline": self.pipeline,
            "text": self.text,
            "level": self.level,
            "max_kl": self.limit,
            "total": _figures(self.total),
            "kinds": {
                kind: {
                    **_figures(each.loss),
                    "reference_perplexity": _digits(each.reference_perplexity),
                    "perplexity": _digits(each.perplexity),
                }
                for kind, each in self.kinds.items()
            },
            "layers": [
                {
                    "weights": list(layer.names),
                    "format": layer.format,
                    "plain": float(f"{layer.plain:.3g}"),
                    "error": float(f"{layer.error:.3g}"),
                }
                for layer in self.layers
            ],
        }
        return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def report_text(path: Path, manifest: Manifest) -> str | None:
    """The table of an artifact; None where nothing was quantized by name. Raises kinds "artifact" and "io"."""
    file = Contents(path, manifest) / FILE
    if not file.is_file():
        return None
    found = parse_json(file.read_bytes(), FILE)
    try:
        return table_text(found)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError):
        raise XllmError(
            "artifact", f"{FILE} is not what the compiler wrote", where=str(file), help="compile the checkpoint again"
        ) from None


def table_text(found: dict[str, object]) -> str:
    """What `LossReport.to_json` wrote, for people: the total, the kinds of text, the layers that changed most."""
    total, layers, kinds = found["total"], found["layers"], found["kinds"]
    assert isinstance(total, dict) and isinstance(layers, list) and isinstance(kinds, dict)
    limit = "none" if found["max_kl"] is None else f"{found['max_kl']:g}"
    lines = [
        f"loss of {found['form']} against the unquantized model, {found['text']}",
        f"  {'total':<46} KL {_kl(total):>9}  top-1 {total['top1']:7.2%}  "
        f"({total['positions']} positions on {found['level']}, limit {limit})",
    ]
    for kind, each in kinds.items():
        was, is_ = (_digits_text(each[name]) for name in ("reference_perplexity", "perplexity"))
        lines.append(f"  {kind:<46} KL {_kl(each):>9}  top-1 {each['top1']:7.2%}  perplexity {is_}, unquantized {was}")
    worst = sorted(layers, key=lambda layer: -layer["error"])[:_SHOWN]
    if worst:
        count = f"the {len(worst)} of {len(layers)} with most" if len(layers) > len(worst) else "the worst first"
        lines.append(f"  error of each layer's outputs, and by plain rounding (squares, calibration text); {count}")
    for layer in worst:
        lines.append(
            f"  {_short(layer['weights']):<46} {layer['error']:>9.3g}  plain {layer['plain']:>9.3g}  {layer['format']}"
        )
    return "\n".join(lines)


def _figures(loss: Loss) -> dict[str, object]:
    return {"kl": _digits(loss.kl), "top1": round(loss.top1, 4), "positions": loss.positions}


def _digits(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _digits_text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _kl(figures: dict[str, Any]) -> str:
    return _digits_text(figures["kl"])


def _short(names: list[str]) -> str:
    """The tensors of one weight in one word: model.layers.0.mlp.gate_proj+up_proj."""
    first = names[0].removesuffix(".weight")
    stem = first.rpartition(".")[0]
    rest = [name.removesuffix(".weight").removeprefix(f"{stem}.") for name in names[1:]]
    return "+".join([first, *rest])
