"""From an artifact to an engine that can be started. Owns the order of a start and the options that change it; shared
by the server and the offline `LLM`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compiler.artifact import Manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import host, memory
from xllm_compiler.runtime.engine import MAX_QUEUED, Engine
from xllm_compiler.runtime.executor import embedding_size, served_functions
from xllm_compiler.runtime.loader import LoadedArtifact, load_artifact
from xllm_compiler.runtime.memory import MemoryPlan
from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.phases import Phases
from xllm_compiler.runtime.tokenizer import Tokenizer, read_json_object

if TYPE_CHECKING:
    from xllm_compiler.runtime.profile.profiler import Profiler

_MAX_THREADS = 1024


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """None means the artifact's own limit, or what fits the machine. Limits can be lowered here, never raised: the
    artifact's programs and buffers are made for them."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    memory_utilization: float = memory.DEFAULT_UTILIZATION
    threads: int | None = None
    level: str | None = None  # of the target; of the CPU, an instruction set
    max_queued: int = MAX_QUEUED
    max_body_size: int | None = None  # of a server's requests, in bytes; None where there is no server

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise XllmError("option", f"{_flag(name)} must be a positive integer, got {value!r}")
        if self.threads is not None and self.threads > _MAX_THREADS:
            raise XllmError("option", f"--threads must be at most {_MAX_THREADS}, got {self.threads}")
        if not (math.isfinite(self.memory_utilization) and 0 < self.memory_utilization <= 1):
            raise XllmError("option", f"--memory-utilization must be in (0, 1], got {self.memory_utilization}")
        if self.max_queued < 1:
            raise XllmError("option", f"--max-queued must be a positive integer, got {self.max_queued}")


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that is ready to `start()`, and what became of its artifact. `sampling_defaults`: the sampling fields
    that the checkpoint's generation_config.json sets, under SamplingParams' names."""

    engine: Engine
    artifact: LoadedArtifact
    model_info: ModelInfo
    memory_plan: MemoryPlan
    tokenizer: Tokenizer | None
    sampling_defaults: Mapping[str, Any]
    threads: int


def prepare_engine(path: Path, options: EngineOptions, phases: Phases, profiler: Profiler | None = None) -> Started:
    """Load, budget, allocate. `profiler` watches the first steps. Raises XllmError, which says what to do."""
    artifact = load_artifact(path, options.level)
    phases.mark("load artifact")
    manifest = artifact.manifest
    tokenizer = Tokenizer.load(artifact.files) if "tokenizer.json" in manifest.files else None
    defaults = sampling_defaults(read_json_object(artifact.files / "generation_config.json"))
    phases.mark("load tokenizer")
    model_info = _model_info(manifest, options)
    memory_plan = _decide_memory(manifest, model_info, options)
    phases.mark("decide memory")
    threads = options.threads or host.default_threads()
    executor = artifact.code.executor(artifact.weights, pages=memory_plan.pages, threads=threads)
    if profiler is not None:
        executor = profiler.wrap(artifact, executor)
    engine = Engine(
        executor,
        model_info,
        tokenizer=tokenizer,
        max_queued=options.max_queued,
        before_first_output=artifact.wait_checked,
    )
    artifact.guard.watch(engine)
    if profiler is not None:
        profiler.watch(engine)
    phases.mark("start threads")
    return Started(engine, artifact, model_info, memory_plan, tokenizer, defaults, threads)


_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings that a checkpoint's authors recommend, under SamplingParams' names."""
    found = {name: generation_config[name] for name in _SAMPLING_FIELDS if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        # Its other settings are left-overs then: transformers ignores them too.
        return {"temperature": 0.0, **{k: v for k, v in found.items() if k == "repetition_penalty"}}
    if generation_config.get("max_new_tokens") is not None:
        found["max_tokens"] = generation_config["max_new_tokens"]
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _model_info(manifest: Manifest, options: EngineOptions) -> ModelInfo:
    model, limits = manifest.model, manifest.limits
    chosen: dict[str, int] = {}
    for name, most in (
        ("max_model_len", model.max_model_len),
        ("max_num_seqs", limits.max_num_seqs),
        ("max_num_batched_tokens", limits.max_num_batched_tokens),
    ):
        wanted = getattr(options, name)
        if wanted is not None and wanted > most:
            raise XllmError(
                "option",
                f"{_flag(name)} {wanted} is more than the {most} that the artifact was compiled for",
                help=f"compile the checkpoint again with {_flag(name)} {wanted}",
            )
        chosen[name] = most if wanted is None else wanted
    if chosen["max_num_batched_tokens"] < chosen["max_num_seqs"]:
        if options.max_num_seqs is not None:
            raise XllmError(
                "option",
                f"--max-num-batched-tokens {chosen['max_num_batched_tokens']} is less than --max-num-seqs "
                f"{chosen['max_num_seqs']}: every running request needs a token of a step",
            )
        chosen["max_num_seqs"] = chosen["max_num_batched_tokens"]
    return ModelInfo(
        name=model.name,
        architecture=model.architecture,
        artifact_id=manifest.id,
        dtype=model.dtype,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        bos_token_id=model.bos_token_id,
        max_num_logits=limits.max_num_logits,
        page_tokens=manifest.page_tokens,
        functions=served_functions(manifest),
        pooling=model.pooling,
        embedding_size=embedding_size(manifest),
        **chosen,
    )


def _decide_memory(manifest: Manifest, model_info: ModelInfo, options: EngineOptions) -> MemoryPlan:
    # Formulas are monotone in the sizes; P enters none of them in a sound plan, and its upper limit would hide that.
    at_limits = manifest.limit_values(1)
    page_tokens = manifest.page_tokens
    width = -(-manifest.model.max_model_len // page_tokens)
    inputs = [spec for function in manifest.functions.values() for spec in function.inputs]
    input_bytes = sum(spec.nbytes().evaluate(at_limits) for spec in inputs)
    given = options.kv_cache_memory_bytes is not None
    available = None if given and options.max_body_size is None else host.available_memory()
    requests, text = 0, 0
    if options.max_body_size is not None and available is not None:
        requests, text = memory.for_requests(available, options.max_body_size)
    fixed = memory.Fixed(
        weights=manifest.weights.bytes,
        arena=manifest.arena_bytes(at_limits),
        outputs=manifest.output_bytes(at_limits),
        host=input_bytes + 4 * width * manifest.limits.max_num_seqs,
        requests=requests,
        text=text,
    )
    return memory.decide(
        fixed,
        page_bytes=manifest.page_bytes,
        page_tokens=page_tokens,
        max_model_len=model_info.max_model_len,
        max_num_seqs=model_info.max_num_seqs,
        max_pages=manifest.dims["P"].hi,
        available=None if given else available,
        kv_bytes=options.kv_cache_memory_bytes,
        utilization=options.memory_utilization,
    )
