"""The rotary embedding of a GGUF file as transformers' `rope_parameters`.

llama.cpp stores what Llama 3 and Phi do to frequencies as tables of factors, transformers as the numbers from which
they are computed.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.files import damaged
from xllm_compiler.frontend.gguf.file import GgufFile
from xllm_compiler.frontend.gguf.keys import Keys
from xllm_compiler.frontend.gguf.tensors import GgufEntry
from xllm_compiler.frontend.safetensors import Array

_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every model that Meta has published. The file has the table alone."""


def rope_of(file: GgufFile, keys: Keys, size: int, length: int) -> dict[str, Any]:
    """Of heads of `size` values and sequences of `length` tokens. Raises XllmError("checkpoint" | "unsupported")."""
    base = keys.number("rope.freq_base", 10000.0)
    if not base > 0:
        raise damaged(f"{keys.prefix}rope.freq_base is {base}", file.path)
    scaling = keys.text("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", 0.0)
    original = keys.whole("rope.scaling.original_context_length", length)
    attention = keys.number("rope.scaling.attn_factor", 0.0)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    tables = {name for name in ("rope_freqs", "rope_factors_long", "rope_factors_short") if _stands(file, name)}
    if tables == {"rope_freqs"} and scaling in ("", "none"):
        return found | _llama3(file, base, size)
    if tables == {"rope_factors_long", "rope_factors_short"} and scaling in ("", "none", "longrope"):
        long, short = (_table(file, f"rope_factors_{kind}").tolist() for kind in ("long", "short"))
        scaled = {"long_factor": long, "short_factor": short, "original_max_position_embeddings": original}
        found |= {"rope_type": "longrope", "factor": length / original, **scaled}
        return found | ({"attention_factor": attention} if attention else {})
    if tables:
        raise _unknown(file, f"tables of factors ({', '.join(sorted(tables))}) and scaling {scaling!r} together")
    match scaling:
        case "" | "none":
            if factor not in (0.0, 1.0):
                raise _unknown(file, f"a factor of {factor} without a kind of scaling")
            return found
        case "linear" | "yarn":
            if not factor >= 1:
                raise _unknown(file, f"scaling {scaling!r} by {factor}")
            found |= {"rope_type": scaling, "factor": factor}
            if scaling == "yarn":
                found["original_max_position_embeddings"] = original
                if attention not in (0.0, 1.0):  # llama.cpp multiplies YaRN's own by it
                    raise _unknown(file, f"YaRN with an attention factor of {attention}")
            return found
    raise _unknown(file, f"scaling {scaling[:40]!r}")


def _stands(file: GgufFile, name: str) -> bool:
    return f"{name}.weight" in file.tensors


def _table(file: GgufFile, name: str) -> Array:
    info = file.tensors[f"{name}.weight"]
    if len(info.shape) != 1 or info.type != "F32" or info.shape[0] > 1 << 12:
        raise damaged(f"tensor {info.name!r} is {info.type}{list(info.shape)}, no table of factors", file.path)
    found = GgufEntry(info.name, info.type, info.shape, file.path, info.start, info.nbytes).floats(np.dtype("<f4"))
    if not np.isfinite(found).all() or not (found > 0).all():
        raise damaged(f"tensor {info.name!r} holds factors that are not positive", file.path)
    return found


def _llama3(file: GgufFile, base: float, size: int) -> dict[str, Any]:
    """The setting that makes the table, by which frequencies are divided."""
    table = _table(file, "rope_freqs").astype(np.float64)
    if len(table) != size // 2:
        raise damaged(f"tensor 'rope_freqs.weight' has {len(table)} factors, heads have {size} values", file.path)
    factor = float(table.max())
    if (table == 1).all():
        return {}
    low, high, length = _LLAMA3.values()
    waves = 2 * math.pi * base ** (np.arange(0, size, 2) / size)
    smooth = (length / waves - low) / (high - low)
    made = 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1))
    if not np.allclose(made, table, rtol=1e-4):
        raise _unknown(file, "a table of factors (rope_freqs) that is not Llama 3's")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _unknown(file: GgufFile, what: str) -> XllmError:
    return XllmError(
        "unsupported",
        f"the rotary embedding has {what}",
        where=str(file.path),
        help="take the model's Hugging Face form",
    )
