"""What one may ask of a compile, and what that means for a checkpoint. Owns flags' ranges and defaults; must not import
torch, TVM or anything that is slow, since `xllm-compile explain` answers from here."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.embedding import default_functions
from xllm_compiler.frontend.gguf.tensors import GgufEntry
from xllm_compiler.frontend.lengths import lengths_of
from xllm_compiler.frontend.quantized_config import quantized_config, side_notes
from xllm_compiler.passes.quantize.forms import MIXED, MIXED_MAX_KL, NARROW, parse_form
from xllm_compiler.step.interface import EMBED, STEP
from xllm_compiler.targets import DEFAULT, Target, target_class

FUNCTIONS = (STEP, EMBED)
DTYPES = {"float32": "f32", "bfloat16": "bf16"}

MAX_SEQS = 4096
MAX_BATCHED_TOKENS = 1 << 16
MAX_MODEL_LEN = 1 << 20

DEFAULT_SEQS = 64
DEFAULT_BATCHED_TOKENS = 2048
DEFAULT_MODEL_LEN_LIMIT = 1 << 17  # rotary tables grow with the length, 64 MiB at this one and 128 rotated dims
LOGIT_ROWS = (
    128  # a prompt's log-probabilities are computed this many rows at a time; a row is 4 bytes a vocabulary item
)


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """As the user gave them; None means the default, which may depend on the checkpoint (`resolve`). `target`: by its
    name, or with options of its own."""

    target: str | Target = DEFAULT
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    pipeline: str | None = None
    name: str | None = None
    quantize: str | None = None
    max_kl: float | None = None
    functions: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """Every option with its value. `notes` tells of defaults that somebody may not expect.

    `quantize` is "mixed" or the canonical name of a form, and None without one; `pipeline` is then what makes the form
    (of mixed, what it starts from). `max_kl` is None where any loss is accepted. `functions`: those of FUNCTIONS that
    the artifact has, in their order there."""

    target: Target
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_logits: int
    pipeline: str
    quantize: str | None
    max_kl: float | None
    name: str
    functions: tuple[str, ...]
    notes: tuple[str, ...]

    def factors(self) -> dict[str, Any]:
        """By field name, the JSON value of each option that decides the result. The target stands for its name; its own
        options are its own factors. `pipeline` is not here: what counts of it is its canonical text."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("notes", "pipeline", *(() if self.quantize is not None else ("max_kl",))):
            del values[name]
        return {**values, "target": self.target.name, "functions": list(self.functions)}


def resolve(options: CompileOptions, checkpoint: Checkpoint) -> Resolved:
    """Check every option and fill in defaults. Raises kind "option" naming the flag and what it may be."""
    notes = [*checkpoint.notes, *side_notes(checkpoint)]
    target = target_class(options.target)() if isinstance(options.target, str) else options.target
    target = target.resolved()
    dtype = DTYPES[_one_of("--dtype", options.dtype or _default_dtype(checkpoint, notes), tuple(DTYPES))]
    max_model_len = _model_len(options.max_model_len, checkpoint, notes)
    seqs = _in_range("--max-num-seqs", options.max_num_seqs, DEFAULT_SEQS, 1, MAX_SEQS)
    tokens = _in_range(
        "--max-num-batched-tokens",
        options.max_num_batched_tokens,
        max(DEFAULT_BATCHED_TOKENS, seqs),
        1,
        MAX_BATCHED_TOKENS,
    )
    if tokens < seqs:
        raise XllmError(
            "option",
            f"--max-num-batched-tokens {tokens} is less than --max-num-seqs {seqs}",
            help="every running request needs a token in each step",
        )
    name = options.name
    if name is None:  # a directory's name may be any bytes
        path = checkpoint.path.resolve()
        name = os.fsencode(path.name if checkpoint.gguf is None else path.stem).decode("utf-8", "replace")
    if not name or re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name) or len(name) > 256:
        raise XllmError("option", f"--name {name!r} is not a model name", help="up to 256 printable characters")
    pipeline, form = _pipeline(options, target, checkpoint, notes)
    max_kl = _max_kl(options, form)
    functions = _functions(options, checkpoint)
    if form is not None and STEP not in functions:
        raise XllmError(
            "option",
            f"--quantize measures what logits lose, and there is no function {STEP}",
            help="--functions step,embed, where the checkpoint has a head",
        )
    # A row of hidden states is small, and the mean takes one of every token.
    rows = tokens if functions == (EMBED,) else min(tokens, LOGIT_ROWS)
    return Resolved(
        target=target,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_num_logits=max(seqs, rows),
        pipeline=pipeline,
        quantize=form,
        max_kl=max_kl,
        name=name,
        functions=functions,
        notes=tuple(notes),
    )


def _functions(options: CompileOptions, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the artifact will do: what was asked for, else what the checkpoint is for."""
    if options.functions is None:
        return default_functions(checkpoint)
    for name in options.functions:
        _one_of("--functions", name, FUNCTIONS)
    if not options.functions:
        raise XllmError("option", "--functions is empty", help=f"name some of {', '.join(FUNCTIONS)}")
    return tuple(name for name in FUNCTIONS if name in options.functions)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _default_dtype(checkpoint: Checkpoint, notes: list[str]) -> str:
    """bfloat16 when most bytes of the float weights are of 16 bits, or of blocks of fewer. A config that says another
    width is told of: loaders that go by it compute with other numbers."""
    narrow = wide = 0
    for entry in checkpoint.tensors.values():
        if entry.dtype in ("BF16", "F16") or (isinstance(entry, GgufEntry) and entry.in_blocks):
            narrow += entry.nbytes
        elif entry.is_float:
            wide += entry.nbytes
    chosen = "bfloat16" if narrow > wide else "float32"
    config = text_config(checkpoint.config)
    said = config.get("dtype") or config.get("torch_dtype")
    if narrow + wide and said in ("float32", "float16", "bfloat16") and (said == "float32") != (chosen == "float32"):
        notes.append(
            f"config.json says {said}, most weights are stored with {16 if narrow > wide else 32} bits: "
            f"--dtype is {chosen}"
        )
    return chosen


def _model_len(given: int | None, checkpoint: Checkpoint, notes: list[str]) -> int:
    lengths = lengths_of(text_config(checkpoint.config))
    trained, most = lengths.trained, lengths.most
    if given is not None:
        value = _in_range("--max-model-len", given, given, 1, MAX_MODEL_LEN)
        if most is not None and value > most:
            raise XllmError(
                "option",
                f"--max-model-len {value} is more than the {most} positions that the model was made for",
                where=str(checkpoint.config_file),
                help=f"ask for {most} or less",
            )
        return value
    if trained is None or most is None:
        notes.append(f"config.json gives no length; --max-model-len is {DEFAULT_BATCHED_TOKENS}")
        return DEFAULT_BATCHED_TOKENS
    chosen = min(trained, DEFAULT_MODEL_LEN_LIMIT)
    if most > chosen and lengths.scaling != "dynamic":
        by = f" ({lengths.scaling})" if lengths.scaling else ""
        notes.append(f"--max-model-len is {chosen}; the model allows {min(most, MAX_MODEL_LEN)}{by} when asked for")
    return chosen


def _default_pipeline(target: Target, checkpoint: Checkpoint, notes: list[str]) -> str:
    """What the checkpoint asks for: weights as they are stored, and inputs rounded where it was made for that."""
    stored = quantized_config(checkpoint)
    rows = stored is not None and stored.rows
    chosen = target.pipeline(rows)
    if rows and chosen == target.pipeline(False):
        notes.append(f"the checkpoint was made for rounded inputs; target {target.name} does not round them")
    return chosen


def _pipeline(
    options: CompileOptions, target: Target, checkpoint: Checkpoint, notes: list[str]
) -> tuple[str, str | None]:
    """The pipeline that is asked for, in words or by the form of quantization that it makes; and that form's name."""
    if options.quantize is None:
        return options.pipeline if options.pipeline is not None else _default_pipeline(target, checkpoint, notes), None
    mixed = options.quantize.strip().lower() == MIXED
    form = NARROW if mixed else parse_form(options.quantize)
    if options.pipeline is not None:
        raise XllmError(
            "option",
            "--quantize and --pipeline exclude each other",
            help=f"--quantize {form} chooses a pipeline; in one of your own say {','.join(form.passes())}",
        )
    return ",".join(target.quantized(form)), MIXED if mixed else str(form)


def _max_kl(options: CompileOptions, form: str | None) -> float | None:
    """The loss that is allowed, in nats; None: any."""
    given = options.max_kl
    if form is None:
        if given is not None:
            raise XllmError("option", "--max-kl without --quantize", help="it limits what quantization may lose")
        return None
    if given is None:
        return MIXED_MAX_KL if form == MIXED else parse_form(form).max_kl
    if not given > 0:
        raise XllmError("option", f"--max-kl {given} is not a limit", help="nats above 0, or inf to accept any loss")
    if math.isinf(given) and form == MIXED:
        raise XllmError("option", "--quantize mixed needs a limit to keep", help="give --max-kl in nats, or use int4")
    return None if math.isinf(given) else given


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise XllmError("option", f"{flag} {value!r} is not known", help=f"choose from {', '.join(allowed)}")
    return value


def _in_range(flag: str, value: int | None, default: int, low: int, high: int) -> int:
    chosen = default if value is None else value
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not low <= chosen <= high:
        raise XllmError(
            "option", f"{flag} {chosen!r} is out of range", help=f"give a whole number from {low} to {high}"
        )
    return chosen
