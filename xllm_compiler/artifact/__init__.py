"""The on-disk format: the only thing, with dims, that compiler and runtime share."""

from xllm_compiler.artifact.calls import CallTable, KernelCost, ProgramCalls, read_calls
from xllm_compiler.artifact.contents import Contents, unlisted
from xllm_compiler.artifact.digest import digest_file
from xllm_compiler.artifact.io import check_files, check_size, is_artifact, read_manifest
from xllm_compiler.artifact.schema import (
    CALLS,
    FORMAT,
    MANIFEST,
    MODULE,
    WEIGHTS,
    DimRange,
    FileEntry,
    Limits,
    Manifest,
    Model,
    Target,
    Weight,
    Weights,
)

__all__ = [
    "CALLS",
    "FORMAT",
    "MANIFEST",
    "MODULE",
    "WEIGHTS",
    "CallTable",
    "Contents",
    "DimRange",
    "FileEntry",
    "KernelCost",
    "Limits",
    "Manifest",
    "Model",
    "ProgramCalls",
    "Target",
    "Weight",
    "Weights",
    "check_files",
    "check_size",
    "digest_file",
    "is_artifact",
    "read_calls",
    "read_manifest",
    "unlisted",
]
