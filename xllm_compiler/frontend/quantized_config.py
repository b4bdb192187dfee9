"""What config.json says about how a checkpoint was quantized. Owns the methods and settings that can be read, and the
refusal of all others by name; must not read tensors, and imports nothing slow, since option parsing asks it.

Sources: the `quantization_config` of transformers (utils/quantization_config.py) for awq, gptq and fp8, and
compressed_tensors/quantization/quant_config.py with utils/match.py for compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any, Final

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint

METHODS: Final = ("compressed-tensors", "awq", "gptq", "fp8", "fbgemm_fp8")
_PATTERN_SECONDS: Final = 1.0
MODELOPT: Final = "hf_quant_config.json"
_FORMATS: Final = ("int-quantized", "pack-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_GPTQ_FORMATS: Final = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight was rounded. `group`: values along `in` that share a scale; 0: the row, or all of the weight."""

    bits: int
    group: int = 0
    zeros: bool = False  # whether zero points are stored
    block: tuple[int, int] | None = None  # rows and columns that share a scale, of 8-bit floats
    floats: bool = False  # whether the stored values are 8-bit floats
    rows: bool = False  # whether the inputs are meant to be rounded to 8-bit integers, row by row, as they come
    inputs: str = ""  # what else is meant to happen to the inputs, which this compiler does not do


@dataclass(frozen=True)
class QuantizedConfig:
    """The checked settings of a quantized checkpoint. `of(module, kind)` is the scheme of one module."""

    method: str
    where: str
    scheme: Scheme  # of every module that has none of its own
    targets: tuple[tuple[str, Scheme], ...] = ()  # compressed-tensors: target -> scheme
    overrides: tuple[tuple[str, Scheme], ...] = ()  # gptq: pattern -> scheme
    v1: bool = True  # gptq: zero points are stored less one
    symmetric: bool = True  # gptq: zero points are all the middle

    def of(self, module: str, kind: str = "Linear") -> Scheme:
        """The scheme of a module of the class `kind`; an exact name wins over a pattern, a pattern over a class."""
        for pattern, scheme in self.overrides:
            if _matches(pattern, module, self.where):
                return scheme
        found = [(self._closeness(target, module, kind), scheme) for target, scheme in self.targets]
        best = max(found, key=lambda pair: pair[0], default=(0, self.scheme))
        if self.targets and not best[0]:
            raise XllmError(
                "checkpoint",
                f"module {module!r} is stored quantized, but is a target of no config group",
                where=self.where,
            )
        return best[1]

    def _closeness(self, target: str, module: str, kind: str) -> int:
        if target == module:
            return 3
        if target.startswith("re:"):
            return 2 if _matches(target.removeprefix("re:"), module, self.where) else 0
        return 1 if target == kind else 0

    @property
    def schemes(self) -> list[Scheme]:
        """Every scheme that some module may have."""
        named = [scheme for _, scheme in (*self.targets, *self.overrides)]
        return named if self.targets else [self.scheme, *named]

    @property
    def rows(self) -> bool:
        """Whether every scheme wants its inputs rounded to 8-bit integers as they come."""
        return all(scheme.rows for scheme in self.schemes)

    def notes(self) -> list[str]:
        """What the checkpoint asks of its inputs and is not done: they are left more precise than it says."""
        said = [scheme.inputs for scheme in self.schemes if scheme.inputs]
        if not self.rows and any(scheme.rows for scheme in self.schemes):
            said.append("8-bit inputs of some layers only")
        return [f"the checkpoint asks for {what}; inputs stay as they are" for what in dict.fromkeys(said)]


def quantized_config(checkpoint: Checkpoint) -> QuantizedConfig | None:
    """The settings of a quantized checkpoint, None for another. XllmError("unsupported") names an unknown method or
    setting, XllmError("checkpoint") one that makes no sense.

    config.json has the first word, as in transformers. Before it had one, GPTQ and AWQ kept their settings in files of
    their own, which are read where tensors are stored as they say (`side_notes` tells of the others)."""
    raw = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if raw:
        return _parsed(raw, str(checkpoint.path / "config.json"))
    for name, settings in checkpoint.beside.items():
        if name == MODELOPT or _stored_packed(checkpoint):
            return _parsed(_with_method(name, settings), str(checkpoint.path / name))
    if isinstance(checkpoint.config.get("quantization"), dict):  # MLX has the same key for its own
        raise _unreadable("mlx", str(checkpoint.path / "config.json"))
    return None


def side_notes(checkpoint: Checkpoint) -> list[str]:
    """What the user should know of settings beside config.json: that they are not used, or say something else."""
    used = quantized_config(checkpoint)
    notes = []
    for name, settings in checkpoint.beside.items():
        if used is None:
            notes.append(f"{name} is not used: no tensor is stored quantized as it says")
        elif used.where != str(checkpoint.path / name):
            first = PurePath(used.where).name
            try:
                said = _parsed(_with_method(name, settings), used.where)
            except XllmError as error:
                notes.append(f"{name} is not used beside {first}: {error.message}")
                continue
            if said != used:
                notes.append(f"{name} contradicts {first}, which is used: {_differences(said, used)}")
    return notes


def _stored_packed(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(".qweight") for name in checkpoint.tensors)


def _with_method(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file of its own, with the method that config.json would name."""
    if name == MODELOPT:
        inner = settings.get("quantization")
        algorithm = inner.get("quant_algo") if isinstance(inner, dict) else None
        return {**settings, "quant_method": f"modelopt {algorithm or ''}".strip()}
    awq = "w_bit" in settings or "zero_point" in settings or "version" in settings
    return {"quant_method": "awq" if awq else "gptq", **settings}


def _differences(said: QuantizedConfig, used: QuantizedConfig) -> str:
    """Where the two part, for people."""
    if said.method != used.method:
        return f"{said.method} instead of {used.method}"
    parts = [
        f"{field.name} {getattr(said.scheme, field.name)} instead of {getattr(used.scheme, field.name)}"
        for field in fields(Scheme)
        if getattr(said.scheme, field.name) != getattr(used.scheme, field.name)
    ]
    parts += [
        f"{name} {getattr(said, name)} instead of {getattr(used, name)}"
        for name in ("v1", "symmetric")
        if getattr(said, name) != getattr(used, name)
    ]
    return ", ".join(parts) or "settings of single modules"


def _unreadable(method: str, where: str) -> XllmError:
    named = f"by {method!r}" if method else f"by a method that {PurePath(where).name} does not name"
    return XllmError(
        "unsupported",
        f"the checkpoint was quantized {named}",
        where=where,
        help=f"what can be read: {', '.join(METHODS)}; or use the unquantized checkpoint",
    )


def _parsed(raw: object, where: str) -> QuantizedConfig:
    if not isinstance(raw, dict):
        raise XllmError("checkpoint", "quantization_config is not an object", where=where)
    method = str(raw.get("quant_method", "")).lower()
    if not method and "config_groups" in raw:
        method = "compressed-tensors"
    if method not in METHODS:
        raise _unreadable(method, where)
    return {"compressed-tensors": _compressed, "awq": _awq, "gptq": _gptq}.get(method, _fp8)(raw, method, where)


def _matches(pattern: str, module: str, where: str) -> bool:
    """Whether a pattern of the settings is one of the module's name. It is somebody else's pattern, and there are some
    that would take years: hence the library that can be told to stop."""
    import regex

    try:
        return regex.match(pattern, module, timeout=_PATTERN_SECONDS) is not None
    except regex.error as e:
        reason = f"is damaged: {e.msg}"
    except TimeoutError:
        reason = f"takes more than {_PATTERN_SECONDS} s on {module[:80]!r}"
    except RecursionError:
        reason = "is too deep"
    raise XllmError("checkpoint", f"quantization_config: the pattern {pattern[:80]!r} {reason}", where=where)


def _refuse(what: str, where: str, help: str = "") -> XllmError:
    return XllmError("unsupported", what, where=where, help=help)


def _whole(raw: Mapping[str, Any], key: str, default: int | None, where: str) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise XllmError("checkpoint", f"quantization_config: {key} is {value!r}, not a whole number", where=where)
    return value


def _table(raw: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """An object among the settings; {} where there is none."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise XllmError("checkpoint", f"quantization_config: {key} is {value!r:.80}, not an object", where=where)
    return value


def _bits(bits: int, where: str, method: str) -> int:
    if bits not in (4, 8):
        raise _refuse(f"{method} weights of {bits} bits", where, "4 and 8 bits can be read")
    return bits


def _group(size: int, where: str) -> int:
    """A group size as schemes have it: -1 is the whole row."""
    if size < -1 or size == 0:
        raise XllmError("checkpoint", f"quantization_config: groups of {size}", where=where)
    return 0 if size == -1 else size


def _block(value: object, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, int) and v > 0 for v in value):
        raise XllmError("checkpoint", f"quantization_config: blocks of {value!r}", where=where)
    return int(value[0]), int(value[1])


def _awq(raw: dict[str, Any], method: str, where: str) -> QuantizedConfig:
    form = str(raw.get("version") or raw.get("format") or "gemm").lower()
    if form != "gemm":
        raise _refuse(f"AWQ weights packed as {form!r}", where, "only the packing 'gemm' can be read")
    if not raw.get("zero_point", True):
        raise _refuse("AWQ weights without zero points", where)
    bits = _whole(raw, "bits", raw.get("w_bit", 4), where)
    if bits != 4:
        raise _refuse(f"AWQ weights of {bits} bits", where, "4 bits can be read")
    group = _whole(raw, "group_size", raw.get("q_group_size", 128), where)
    return QuantizedConfig(method, where, Scheme(4, _group(group, where), zeros=True))


def _gptq(raw: dict[str, Any], method: str, where: str) -> QuantizedConfig:
    form = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
    if form not in _GPTQ_FORMATS:
        raise _refuse(f"GPTQ weights packed as {form!r}", where, f"what can be read: {', '.join(_GPTQ_FORMATS)}")
    if raw.get("is_marlin_format"):
        raise _refuse("GPTQ weights packed as 'marlin'", where, f"what can be read: {', '.join(_GPTQ_FORMATS)}")
    if str(raw.get("pack_dtype") or "int32").rpartition(".")[2] != "int32":
        raise _refuse(f"GPTQ weights packed into {raw['pack_dtype']}", where, "int32 can be read")

    def scheme(settings: Mapping[str, Any]) -> Scheme:
        bits = _bits(_whole(settings, "bits", None, where), where, "GPTQ")
        return Scheme(bits, _group(_whole(settings, "group_size", 128, where), where), zeros=True)

    overrides: list[tuple[str, Scheme]] = []
    dynamic = _table(raw, "dynamic", where)
    if not all(isinstance(v, dict) for v in dynamic.values()):
        raise XllmError("checkpoint", "quantization_config: dynamic is no table of settings", where=where)
    for pattern, settings in dynamic.items():
        if not pattern.startswith("-:"):  # those are not quantized
            overrides.append((pattern.removeprefix("+:"), scheme({**raw, **settings})))
    symmetric = bool(raw.get("sym", True)) and all(v.get("sym", True) for v in dynamic.values())
    return QuantizedConfig(
        method, where, scheme(raw), overrides=tuple(overrides), v1=form == "gptq", symmetric=symmetric
    )


def _fp8(raw: dict[str, Any], method: str, where: str) -> QuantizedConfig:
    static = raw.get("activation_scheme", "dynamic") != "dynamic"
    inputs = f"inputs in 8-bit floats, with {'fixed' if static else 'dynamic'} scales"
    block = _block(raw.get("weight_block_size"), where)
    return QuantizedConfig(method, where, Scheme(8, block=block, floats=True, inputs=inputs))


def _compressed(raw: dict[str, Any], method: str, where: str) -> QuantizedConfig:
    sparsity = _table(raw, "sparsity_config", where)
    if sparsity.get("format", "dense") != "dense":
        raise _refuse(f"compressed-tensors weights stored sparse, as {sparsity['format']!r}", where)
    if _table(raw, "transform_config", where).get("config_groups"):
        raise _refuse("compressed-tensors weights that need transforms of their inputs (transform_config)", where)
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise XllmError("checkpoint", "quantization_config has no config_groups", where=where)
    targets: list[tuple[str, Scheme]] = []
    for name, group in sorted(groups.items()):
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            raise XllmError("checkpoint", f"quantization_config: config group {name!r} has no targets", where=where)
        form = group.get("format") or raw.get("format")
        if form not in _FORMATS:
            raise _refuse(f"compressed-tensors weights stored as {form!r}", where, f"what can be read: {_FORMATS[:4]}")
        targets += [(str(target), _compressed_scheme(name, group, where)) for target in group["targets"]]
    return QuantizedConfig(method, where, targets[0][1] if targets else Scheme(8), tuple(targets))


def _compressed_scheme(name: str, group: dict[str, Any], where: str) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise _refuse(f"compressed-tensors: config group {name!r} quantizes inputs only", where)
    floats = weights.get("type", "int") == "float"
    bits = _whole(weights, "num_bits", 8, where)
    if floats and bits != 8:
        raise _refuse(f"compressed-tensors weights of {bits}-bit floats", where, "8-bit floats can be read")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise _refuse(f"compressed-tensors weights with scales by {strategy!r}", where)
    if strategy == "block" and not floats:
        raise _refuse("compressed-tensors integers with scales by block", where)
    size = _whole(weights, "group_size", None, where) if strategy == "group" else -1
    rows, said = _inputs(inputs if isinstance(inputs, dict) else None)
    return Scheme(
        bits=bits if floats else _bits(bits, where, "compressed-tensors"),
        group=_group(size, where),
        zeros=not weights.get("symmetric", True),
        block=_block(weights.get("block_structure"), where) if strategy == "block" else None,
        floats=floats,
        rows=rows and not floats,
        inputs=said,
    )


def _inputs(inputs: dict[str, Any] | None) -> tuple[bool, str]:
    """Whether inputs are meant to be rounded as quantize-rows does it; what is asked for otherwise."""
    if inputs is None:
        return False, ""
    bits, kind = inputs.get("num_bits", 8), inputs.get("type", "int")
    dynamic, symmetric = inputs.get("dynamic", False) is True, inputs.get("symmetric", True)
    strategy = inputs.get("strategy") or "tensor"
    if (bits, kind, dynamic, symmetric, strategy) == (8, "int", True, True, "token"):
        return True, ""
    how = "dynamic" if dynamic else "fixed"
    points = "" if symmetric else " and zero points"
    what = "integers" if kind == "int" else "floats"
    return False, f"inputs in {bits}-bit {what}, with {how} scales by {strategy}{points}"
