"""The on-disk format: the only thing, with dims, that compiler and runtime share."""

from xllm_compiler.artifact.cpu_isa import choose_isa, machine_isas
from xllm_compiler.artifact.digest import digest_file
from xllm_compiler.artifact.io import check_files, check_size, is_artifact, read_manifest
from xllm_compiler.artifact.schema import (
    FORMAT,
    MANIFEST,
    OUTPUTS,
    STEP,
    WEIGHTS,
    DimRange,
    FileEntry,
    KvLayer,
    KvPlan,
    Limits,
    Manifest,
    Memory,
    Model,
    Program,
    Target,
    TensorSpec,
    Weight,
    Weights,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "OUTPUTS",
    "STEP",
    "WEIGHTS",
    "DimRange",
    "FileEntry",
    "KvLayer",
    "KvPlan",
    "Limits",
    "Manifest",
    "Memory",
    "Model",
    "Program",
    "Target",
    "TensorSpec",
    "Weight",
    "Weights",
    "check_files",
    "check_size",
    "choose_isa",
    "digest_file",
    "is_artifact",
    "machine_isas",
    "read_manifest",
]
