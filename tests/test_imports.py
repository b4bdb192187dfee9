"""Which package may import which: the arrows of docs/architecture.md, read off the source with `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = {
    "errors": "xllm_compiler/errors.py",
    "confined": "xllm_compiler/confined",
    "dims": "xllm_compiler/dims",
    "weight_formats": "xllm_compiler/weight_formats.py",
    "ir": "xllm_compiler/ir",
    "interp": "xllm_compiler/interp",
    "analysis": "xllm_compiler/analysis",
    "frontend": "xllm_compiler/frontend",
    "lowering": "xllm_compiler/lowering",
    "artifact": "xllm_compiler/artifact",
    "step": "xllm_compiler/step",
    "cache": "xllm_compiler/cache.py",
    "workspace": "xllm_compiler/workspace.py",
    "options": "xllm_compiler/options.py",
    "quant_eval": "xllm_compiler/quant_eval",
    "calibration": "xllm_compiler/calibration",
    "driver": "xllm_compiler/driver",
    "plugins": "xllm_compiler/plugins.py",
    "progress": "xllm_compiler/progress.py",
    "sources": "xllm_compiler/sources.py",
    "targets": "xllm_compiler/targets",
    "tools": "xllm_compiler/tools",
    "report": "xllm_compiler/report",
    "testing": "xllm_compiler/testing",
    "passes": "passes",
    "kernels": "kernels",
    "models": "models",
    "runtime": "runtime",
}

IR_LEVEL = {"errors", "dims", "step", "weight_formats", "ir", "interp", "analysis"}
MAY_IMPORT = {
    "errors": set(),
    "confined": {"errors"},  # what the compiler tries and the server runs in a child process is the same
    "dims": {"errors"},
    "step": {"errors", "dims"},  # what compiler, runtime and kernels agree on
    "weight_formats": {"errors", "dims"},
    "ir": {"errors", "dims", "step", "weight_formats"},
    "interp": {"errors", "dims", "step", "ir"},
    "analysis": {"errors", "dims", "step", "weight_formats", "ir"},
    "plugins": {"errors"},
    "progress": set(),
    "sources": set(),
    "passes": IR_LEVEL | {"plugins"},
    "models": {"errors"},
    "frontend": IR_LEVEL | {"models", "confined"},
    "kernels": {"errors", "dims", "step", "weight_formats"},
    "lowering": IR_LEVEL | {"passes", "kernels", "artifact"},
    "artifact": {"errors", "dims", "step", "weight_formats"},
    "cache": {"errors", "artifact"},
    "workspace": set(),
    "targets": IR_LEVEL | {"passes", "kernels", "lowering", "artifact", "plugins", "progress", "sources"},
    "options": {"errors", "step", "frontend", "passes", "targets"},
    "quant_eval": IR_LEVEL
    | {"passes", "frontend", "artifact", "targets"}
    | {"runtime"},  # what is measured is what will be served
    "calibration": IR_LEVEL | {"lowering", "quant_eval"},
    "driver": IR_LEVEL
    | {"passes", "frontend", "artifact", "cache", "workspace", "options", "progress", "quant_eval", "sources"}
    | {"targets", "calibration"},
    "report": IR_LEVEL | {"passes"},
    "tools": set(FOLDERS),
    "testing": set(FOLDERS) - {"runtime"},
    "runtime": {"errors", "dims", "step", "artifact", "confined", "plugins"},
}

THIRD_PARTY_ONLY_IN = {
    "torch": {"frontend", "models", "tools"},
    "transformers": {"frontend", "models", "tools"},
    "sympy": {"frontend"},
    "tvm": {"kernels", "lowering"},
    "hypothesis": {"testing"},
    "pickle": set(),
}


def python_files(package: str) -> list[Path]:
    path = ROOT / FOLDERS[package]
    return [path] if path.is_file() else sorted(p for p in path.rglob("*.py") if not p.is_symlink())


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that the file imports, lazily or not, with its line."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    package = inside if inside[0] == "xllm_compiler" else ("xllm_compiler", *inside)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield node.lineno, module
            if module == "xllm_compiler":
                for alias in node.names:
                    yield node.lineno, f"xllm_compiler.{alias.name}"


@pytest.mark.parametrize("package", sorted(FOLDERS))
def test_arrows_point_one_way(package: str) -> None:
    files = python_files(package)
    wrong = []
    for path in files:
        for line, module in imported_modules(path):
            parts = module.split(".")
            where = f"{path.relative_to(ROOT)}:{line} imports {module}"
            if parts[0] == "xllm_compiler" and len(parts) > 1 and parts[1] != "__version__":
                if parts[1] != package and parts[1] not in MAY_IMPORT[package]:
                    wrong.append(where)
            elif parts[0] in THIRD_PARTY_ONLY_IN and package not in THIRD_PARTY_ONLY_IN[parts[0]]:
                wrong.append(where)
            elif parts[0] in {"passes", "runtime", "kernels", "models"}:
                wrong.append(f"{where}: name it xllm_compiler.{module}")
    assert not wrong, "\n".join(wrong)


def test_every_package_is_covered() -> None:
    """A new folder must say what it may import."""
    inside = {p.name for p in (ROOT / "xllm_compiler").iterdir() if not p.name.startswith(("_", "py."))}
    names = {name.removesuffix(".py") for name in inside}
    assert names == set(FOLDERS), names ^ set(FOLDERS)


def test_links_lead_to_the_top_level_folders() -> None:
    for name in ("passes", "runtime", "kernels", "models"):
        link = ROOT / "xllm_compiler" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()


def test_files_stay_small() -> None:
    too_long = []
    for package in FOLDERS:
        for path in python_files(package):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > 600:
                too_long.append(f"{path.relative_to(ROOT)}: {lines} lines")
    assert not too_long, too_long


KERNEL_FOLDERS = {
    "isa": set(),
    "codegen": {"isa"},
    "rows": {"isa", "codegen"},
    "attention": {"isa", "codegen", "rows"},
    "linear": {"isa", "codegen", "rows"},
    "generic": {"isa", "codegen"},
    "native": {"isa", "codegen", "linear"},
}
"""The folders of kernels/tir, and which of the others each may import."""


def test_folders_of_kernels_point_one_way() -> None:
    tir = ROOT / "kernels" / "tir"
    assert {path.name for path in tir.iterdir() if path.name != "__pycache__"} == set(KERNEL_FOLDERS) | {"__init__.py"}
    prefix = "xllm_compiler.kernels.tir."
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for folder, allowed in KERNEL_FOLDERS.items()
        for path in sorted((tir / folder).glob("*.py"))
        for line, module in imported_modules(path)
        if module.startswith(prefix) and module.removeprefix(prefix).split(".")[0] not in allowed | {folder}
    ]
    assert not wrong, "\n".join(wrong)
