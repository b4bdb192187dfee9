"""Checkpoints that were quantized elsewhere, as if they were not: which stored tensors make up the weight of a layer,
and that weight as integers, scales and zero points, or as floats. Owns the checks of shapes and dtypes.

A weight keeps its integers where our kernels' form holds exactly what is stored. Where it does not (8-bit floats,
columns in groups out of order, group scales that f16 cannot hold, odd group sizes) the weight is dequantized when it is
read, and `why` says so. Nothing is rounded a second time. At most one weight is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend import quantized_pack as pack
from xllm_compiler.frontend.checkpoint import Array, Checkpoint, TensorEntry
from xllm_compiler.frontend.gguf.tensors import BlockWeight, GgufEntry
from xllm_compiler.frontend.quantized_config import QuantizedConfig, Scheme, quantized_config
from xllm_compiler.frontend.quantized_weight import StoredWeight
from xllm_compiler.ir.semantics import NP_DTYPE
from xllm_compiler.weight_formats import STEP, IntegerFormat

_FP8: Final = ("F8_E4M3", "F8_E5M2")
_FLOATS: Final = ("F16", "BF16", "F32")
# The last part of the names of tensors that belong to a quantized weight.
_AWQ_PARTS: Final = ("qweight", "qzeros", "scales")
_GPTQ_PARTS: Final = (*_AWQ_PARTS, "g_idx")
_FP8_SCALES: Final = ("weight_scale_inv", "weight_scale")
_FP8_PARTS: Final = (*_FP8_SCALES, "input_scale", "activation_scale", "input_scale_ub")
_COMPRESSED_PARTS: Final = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
_CACHE_SCALES: Final = ("k_scale", "v_scale", "q_scale")


@dataclass(frozen=True)
class PackedWeight(StoredWeight):
    """The weight [out, in] of one module, of which the checkpoint holds the tensors `module`.qweight and so on."""

    module: str
    name: str  # of the weight, had it not been quantized
    shape: tuple[int, int]
    scheme: Scheme
    checkpoint: Checkpoint
    config: QuantizedConfig

    # ---- what becomes of it

    @property
    def group(self) -> int:
        """As ops have it: 0 where a group is the whole row."""
        return 0 if self.scheme.group == self.shape[1] else self.scheme.group

    @cached_property
    def why(self) -> str:
        """Why it cannot stay in integers, "" where it can."""
        if self.scheme.floats:
            return "8-bit floats have no kernels"
        if not self._in_order:
            return "its columns belong to groups in the order of their activations (desc_act)"
        if self.group % STEP:
            return f"groups of {self.group} are no multiple of {STEP}"
        if self.group and not _fits_half(self.scales()):
            return "its scales are no 16-bit floats"
        return ""

    @property
    def format(self) -> IntegerFormat:
        """The weight format that holds exactly what is stored, where there is one (`why`)."""
        return IntegerFormat(self.scheme.bits, self.group, self.has_zeros)

    @cached_property
    def has_zeros(self) -> bool:
        """Whether some zero point is not the middle of the range."""
        if not self.scheme.zeros:
            return False
        if self.config.method == "gptq" and self.config.symmetric:
            return bool((self._zeros() != 1 << (self.scheme.bits - 1)).any())
        return True

    # ---- its parts

    def values(self) -> Array:
        """Stored values, u8 [out, in]."""
        bits = self.scheme.bits
        match self.config.method:
            case "awq":
                return pack.awq_columns(self._read("qweight"))
            case "gptq":
                return pack.gptq_rows(self._read("qweight"), bits)
        if "weight_packed" in self.parts:
            return pack.compressed_rows(self._read("weight_packed"), bits, self.shape[1])
        values = pack.unsigned(self._read("weight"), bits)
        if values.max(initial=0) >> bits:
            raise self._wrong("weight", f"holds integers of more than {bits} bits")
        return values

    def scales(self) -> Array:
        """Scales [out, groups], as f16 or f32: of a group or, in f32, of the row."""
        match self.config.method:
            case "awq" | "gptq":
                found = np.ascontiguousarray(self._read("scales").T)
            case _:
                found = self._read("weight_scale").reshape(-1, self._groups)
                found = np.broadcast_to(found, (self.shape[0], self._groups))
        return found if found.dtype == np.float16 and self.group else found.astype(np.float32)

    def zeros(self) -> Array:
        """Zero points, u8 [out, groups]."""
        return self._zeros()

    def floats(self, dtype: str) -> Array:
        """The weight, dequantized in f32 and rounded once, to one of our dtypes."""
        if self.scheme.floats:
            scales, block = self._float_scales()
            return pack.dequantize_floats(self._read("weight"), scales, block, np.dtype(NP_DTYPE[dtype]))
        middle = np.full((self.shape[0], self._groups), 1 << (self.scheme.bits - 1), np.uint8)
        zeros = self._zeros() if self.scheme.zeros else middle
        return pack.dequantize_integers(self.values(), self.scales(), zeros, self._group_of, np.dtype(NP_DTYPE[dtype]))

    # ---- reading

    @cached_property
    def parts(self) -> dict[str, TensorEntry]:
        """The stored tensors by the last part of their names."""
        every = ("weight", *_parts(self.config.method))
        named = {part: f"{self.module}.{part}" for part in every}
        return {part: self.checkpoint.tensors[n] for part, n in named.items() if n in self.checkpoint.tensors}

    @property
    def entries(self) -> Iterable[TensorEntry]:
        return self.parts.values()

    @property
    def _groups(self) -> int:
        return self.shape[1] // self.scheme.group if self.scheme.group else 1

    @cached_property
    def _group_of(self) -> Array:
        """The group of every column, i32 [in]."""
        plain = np.arange(self.shape[1], dtype=np.int32) // (self.scheme.group or self.shape[1])
        part = {"gptq": "g_idx", "compressed-tensors": "weight_g_idx"}.get(self.config.method, "")
        if part not in self.parts:
            return plain
        found = self._read(part).astype(np.int32)
        if part == "weight_g_idx" and (found == -1).all():  # compressed-tensors has it so where it was not used
            return plain
        if found.size and not 0 <= found.min() <= found.max() < self._groups:
            raise self._wrong(part, f"names groups outside 0 .. {self._groups - 1}")
        return found

    @property
    def _in_order(self) -> bool:
        return bool((np.arange(self.shape[1]) // (self.scheme.group or self.shape[1]) == self._group_of).all())

    def _zeros(self) -> Array:
        bits = self.scheme.bits
        match self.config.method:
            case "awq":
                return pack.awq_columns(self._read("qzeros"))
            case "gptq":
                return pack.gptq_zeros(self._read("qzeros"), bits, self.config.v1)
        stored = self._read("weight_zero_point")
        if stored.dtype == np.int32:  # packed along out
            packed = np.ascontiguousarray(stored.T)
            return np.ascontiguousarray(pack.compressed_rows(packed, bits, self.shape[0]).T)
        points = pack.unsigned(stored, bits).reshape(-1, self._groups)
        return np.ascontiguousarray(np.broadcast_to(points, (self.shape[0], self._groups)))

    def _float_scales(self) -> tuple[Array, tuple[int, int]]:
        """Scales by block, and the block's rows and columns."""
        part = next(p for p in _FP8_SCALES if p in self.parts)
        found = self._read(part)
        if found.dtype.itemsize == 1:
            found = pack.power_scales(found)
        out, in_ = self.shape
        if found.size == 1:
            return found.reshape(1, 1), (max(out, 1), max(in_, 1))
        if self.scheme.block is not None:
            return found, self.scheme.block
        return found.reshape(out, -1), (1, self.scheme.group or max(in_, 1))

    def _read(self, part: str) -> Array:
        return self.checkpoint.read(self.parts[part].name)

    # ---- checking

    def check(self) -> None:
        """All parts are there, in the shapes and dtypes of the scheme; its own shape is that of the model, which was
        asked before. XllmError("checkpoint") names the tensor."""
        out, in_ = self.shape
        bits, group = self.scheme.bits, self.scheme.group
        if group and in_ % group:
            raise XllmError(
                "checkpoint",
                f"tensor {self.name!r}: groups of {group} do not divide its {in_} columns",
                where=self.config.where,
            )
        per = 32 // bits
        n = self._groups
        match self.config.method:
            case "awq":
                self._need("qweight", ("I32",), (in_, out // per))
                self._need("qzeros", ("I32",), (n, out // per))
                self._need("scales", _FLOATS, (n, out))
            case "gptq":
                self._need("qweight", ("I32",), (in_ // per, out))
                self._need("qzeros", ("I32",), (n, -(-out // per)))
                self._need("scales", _FLOATS, (n, out))
                if "g_idx" in self.parts:
                    self._need("g_idx", ("I32", "I64"), (in_,))
            case _ if self.scheme.floats:
                self._check_floats()
            case _:
                if "weight_packed" in self.parts:
                    self._need("weight_packed", ("I32",), (out, -(-in_ // per)))
                else:
                    self._need("weight", ("I8",), (out, in_))
                rows = ((out, n), (out,)) if n == 1 else ((out, n),)
                whole = ((1,), (), (1, 1)) if n == 1 else ()
                self._need("weight_scale", _FLOATS, *rows, *whole)
                if self.scheme.zeros:
                    self._need("weight_zero_point", ("I8", "I32"), *rows, (-(-out // per), n), *whole)
                if "weight_g_idx" in self.parts:
                    self._need("weight_g_idx", ("I32", "I64"), (in_,))

    def _check_floats(self) -> None:
        out, in_ = self.shape
        part = next((p for p in _FP8_SCALES if p in self.parts), _FP8_SCALES[0 if self.config.method == "fp8" else 1])
        shapes: list[tuple[int, ...]] = [(), (1,), (1, 1)]
        if self.scheme.block is not None:
            high, wide = self.scheme.block
            shapes = [(-(-out // high), -(-in_ // wide))]
        else:
            shapes += [(out,), (out, 1), *([(out, self._groups)] if self.scheme.group else [])]
        self._need(part, (*_FLOATS, "F8_E8M0", "U8"), *shapes)

    def _need(self, part: str, dtypes: Iterable[str], *shapes: tuple[int, ...]) -> None:
        entry = self.parts.get(part)
        if entry is None:
            raise XllmError(
                "checkpoint",
                f"tensor '{self.module}.{part}' is missing",
                where=str(self.checkpoint.path),
                help=f"{self.module} is stored quantized by {self.config.method}",
            )
        if entry.dtype not in dtypes:
            raise self._wrong(part, f"is {entry.dtype}, not {' or '.join(dtypes)}")
        if entry.shape not in shapes:
            wanted = " or ".join(str(list(s)) for s in dict.fromkeys(shapes))
            raise self._wrong(
                part, f"has shape {list(entry.shape)}, the settings in {Path(self.config.where).name} want {wanted}"
            )

    def _wrong(self, part: str, what: str) -> XllmError:
        entry = self.parts[part]
        return XllmError("checkpoint", f"tensor {entry.name!r} {what}", where=f"{entry.file}: {entry.name}")


@dataclass(frozen=True)
class Quantized:
    """A checkpoint with its quantized weights. `view` names tensors as the unquantized checkpoint would: the weights of
    `weights` stand there under their plain names and without bytes, what they are made of does not."""

    view: Checkpoint
    weights: dict[str, StoredWeight]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Quantized:
        """Also of an unquantized one. Raises XllmError("unsupported" | "checkpoint") naming method or tensor."""
        blocks = [t for t in checkpoint.tensors.values() if isinstance(t, GgufEntry) and t.in_blocks]
        if blocks:
            return cls._view(checkpoint, [BlockWeight.of(entry) for entry in blocks], ())
        config = quantized_config(checkpoint)
        if config is None:
            return cls(checkpoint, {}, ())
        weights = _find(checkpoint, config)
        if not weights:
            raise XllmError(
                "checkpoint",
                f"{Path(config.where).name} says that the checkpoint was quantized by {config.method}, but no tensor "
                "is stored so",
                where=config.where,
            )
        notes = [] if config.rows else config.notes()
        if any(name.rpartition(".")[2] in _CACHE_SCALES for name in checkpoint.tensors):
            notes.append("the checkpoint has scales for a quantized KV cache; the cache is not quantized")
        return cls._view(checkpoint, weights, tuple(notes))

    @classmethod
    def _view(cls, checkpoint: Checkpoint, weights: Sequence[StoredWeight], notes: tuple[str, ...]) -> Quantized:
        tensors = dict(checkpoint.tensors)
        for weight in weights:
            first = next(iter(weight.entries))
            for entry in weight.entries:
                tensors.pop(entry.name)
            tensors[weight.name] = TensorEntry(weight.name, "F32", weight.shape, first.file, first.start, 0)
        kept = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in _CACHE_SCALES}
        return cls(replace(checkpoint, tensors=kept), {w.name: w for w in weights}, notes)

    def dequantized(self) -> list[str]:
        """A line for each reason for which weights are dequantized."""
        counts: dict[str, list[StoredWeight]] = {}
        for weight in self.weights.values():
            if weight.why:
                counts.setdefault(weight.why, []).append(weight)
        return [
            f"{len(found)} of {len(self.weights)} quantized weights are dequantized, {found[0].name} first: {why}; "
            "--quantize rounds them anew"
            for why, found in counts.items()
        ]


def _parts(method: str) -> tuple[str, ...]:
    known = {"awq": _AWQ_PARTS, "gptq": _GPTQ_PARTS, "compressed-tensors": _COMPRESSED_PARTS}
    return known.get(method, _FP8_PARTS)


def _find(checkpoint: Checkpoint, config: QuantizedConfig) -> list[PackedWeight]:
    """The quantized weights, in order of their names; shapes are what the stored values say."""
    found: list[PackedWeight] = []
    modules: dict[str, None] = {}
    for name, entry in sorted(checkpoint.tensors.items()):
        module, _, part = name.rpartition(".")
        if part in _parts(config.method) or (part == "weight" and entry.dtype in ("I8", *_FP8)):
            modules[module] = None
    for module in modules:
        kind = "Embedding" if module.rpartition(".")[2] in ("embed_tokens", "wte", "embedding") else "Linear"
        plain = checkpoint.tensors.get(f"{module}.weight")
        if plain is not None and plain.is_float:  # scales of inputs or of the cache beside a weight that stayed
            continue
        stem = next((p for p in ("qweight", "weight_packed", "weight") if f"{module}.{p}" in checkpoint.tensors), None)
        if stem is None:
            if module.endswith("attn"):
                continue
            raise XllmError(
                "checkpoint",
                f"module {module!r} has scales, but no quantized weight",
                where=str(checkpoint.path),
            )
        scheme = config.of(module, kind)
        entry = checkpoint.tensors[f"{module}.{stem}"]
        shape = _shape(checkpoint, config, module, entry, scheme)
        found.append(PackedWeight(module, f"{module}.weight", shape, scheme, checkpoint, config))
    return found


def _shape(
    checkpoint: Checkpoint, config: QuantizedConfig, module: str, entry: TensorEntry, scheme: Scheme
) -> tuple[int, int]:
    where = f"{entry.file}: {entry.name}"
    if len(entry.shape) != 2:
        raise XllmError("checkpoint", f"tensor {entry.name!r} has shape {list(entry.shape)}, not two axes", where=where)
    first, second = entry.shape
    if config.method == "awq":
        return second * 8, first
    if config.method == "gptq":
        return second, first * 32 // scheme.bits
    if entry.name.endswith("weight_packed"):
        named = f"{module}.weight_shape"
        if named not in checkpoint.tensors:
            raise XllmError("checkpoint", f"tensor {named!r} is missing", where=str(checkpoint.path))
        said = [int(d) for d in checkpoint.read(named).reshape(-1)]
        if len(said) != 2 or min(said) < 1:
            raise XllmError("checkpoint", f"tensor {named!r} says {said}, which is no shape of a weight", where=where)
        return said[0], said[1]
    if scheme.floats != (entry.dtype in _FP8):
        wanted = "8-bit floats" if scheme.floats else "integers"
        raise XllmError(
            "checkpoint",
            f"tensor {entry.name!r} is stored as {entry.dtype}; {Path(config.where).name} says {wanted}",
            where=where,
        )
    return first, second


def _fits_half(scales: Array) -> bool:
    """Whether f16 holds every scale exactly."""
    if scales.dtype == np.float16:
        return True
    with np.errstate(over="ignore"):
        return bool((scales.astype(np.float16).astype(np.float32) == scales).all())
