"""Nothing of a checkpoint or of the current directory is executed: every tool is run in a directory full of modules and
scripts that leave a mark when they are imported, which is also the checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xllm_compiler.models.random_checkpoint import write_random_checkpoint

BIN = Path(sys.executable).parent
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 272,
    "max_position_embeddings": 64,
}
MODULES = (
    *("torch", "transformers", "tvm", "numpy", "jinja2", "tokenizers", "ml_dtypes", "safetensors", "sympy", "xxhash"),
    *("json", "os", "re", "typing", "subprocess", "sitecustomize", "usercustomize", "uvloop", "uvicorn", "starlette"),
    *("ziglang", "triton", "peft", "kernels", "bitsandbytes", "accelerate", "flash_attn", "xllm_compiler", "passes"),
    *("conftest", "setup", "modeling_llama", "configuration_llama", "tokenization_llama", "chat_template", "optimum"),
)
XIR = "xir 1 stage=graph\nfunc @f(%x: f32[2]) -> (f32[2]) {\n  %y = t.neg(%x) : f32[2]\n  return %y\n}\n"
PASS = """
from dataclasses import dataclass
from xllm_compiler.passes.base import FuncPass
from xllm_compiler.passes.registry import register_pass
import helper_of_mine

@register_pass("of-mine")
@dataclass(frozen=True)
class OfMine(FuncPass):
    \"\"\"before and after are the same.\"\"\"

    def run_on(self, func, ctx):
        return False
"""


class Pickled:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint that is full of code, some of it asked for by its own config; marks go to `ran` beside it."""
    root = tmp_path_factory.mktemp("trap") / "model"
    ran = root.parent / "ran"
    ran.mkdir()
    write_random_checkpoint("llama", root, settings=SIZES)
    for i, name in enumerate(MODULES):
        body = f"open({str(ran / name)!r}, 'w').close()\nraise ImportError('of the checkpoint')\n"
        if i % 2:
            (root / name).mkdir()
            (root / name / "__init__.py").write_text(body)
        else:
            (root / f"{name}.py").write_text(body)
    mark = f"open({str(ran)!r} + '/generate', 'w').close()\n"
    (root / "custom_generate").mkdir()
    (root / "custom_generate" / "generate.py").write_text(mark + "def generate(model, *a, **k):\n    return None\n")
    (root / "here.pth").write_text(f"import os; os.system('touch {ran}/pth')\n")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", ".metadata"):
        (root / name).write_bytes(pickle.dumps(Pickled(str(ran / name))))
    config = json.loads((root / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_llama.LlamaConfig",
        "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM",
    }
    config |= {"custom_generate": "custom_generate", "trust_remote_code": True}
    (root / "config.json").write_text(json.dumps(config))
    settings = json.loads((root / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_llama.LlamaTokenizer", None]}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    (root / "m.xir").write_text(XIR)
    (root / "mine.py").write_text(PASS)
    (root / "helper_of_mine.py").write_text("")
    return root


def tool(trap: Path, *words: str, code: int = 0, **env: str) -> str:
    """Runs a program in the trap; it ends with `code` and has executed nothing of what lies there."""
    environment = {**os.environ, **env}
    command = [str(BIN / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=trap, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert [mark.name for mark in (trap.parent / "ran").iterdir()] == []
    return done.stdout


def test_the_trap_works(trap: Path, tmp_path: Path) -> None:
    """What the tests below rely on: that Python finds these modules where it looks for them."""
    ran = trap.parent / "ran"
    code = subprocess.run([sys.executable, "-c", "import peft"], cwd=trap, capture_output=True).returncode
    assert code == 1 and {"peft"} <= {mark.name for mark in ran.iterdir()}
    pickle.loads((trap / "training_args.bin").read_bytes())
    assert (ran / "training_args.bin").exists()
    for mark in ran.iterdir():
        mark.unlink()


FLAGS = ("--isas", "avx2", "--max-num-batched-tokens", "64")


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, {"PYTHONPATH": ""}, {"PYTHONSAFEPATH": "1"}], ids=["plain", "path", "safe"])
def test_compile_verify_and_a_child_of_the_server(trap: Path, tmp_path: Path, env: dict[str, str]) -> None:
    out = str(tmp_path / "artifact")
    tool(trap, "xllm-compile", ".", "-o", out, *FLAGS, **env)
    tool(trap, "xllm-compile", "verify", out, "--checkpoint", ".", **env)
    ask = ("python", "-P", "-m", "xllm_compiler.runtime.ask", ".", "hello", "--max-tokens", "2")
    tool(trap, *ask, XDG_CACHE_HOME=str(tmp_path), **env)


def test_the_compiler_of_the_server_is_started_apart(trap: Path, tmp_path: Path) -> None:
    """As `xllm-serve CHECKPOINT` starts it; the flag is wrong so that it ends before the long phases."""
    from xllm_compiler.runtime import resolve

    command = (sys.executable, *resolve._COMPILE, ".", "--isas", "no-such")
    done = subprocess.run(command, cwd=trap, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--isas" in done.stdout, done.stdout
    assert list((trap.parent / "ran").iterdir()) == []


QUICK = (
    ("xllm-compile", "--help"),
    ("xllm-compile", "explain", ".", "--cache-dir", "cache"),
    ("xllm-opt", "m.xir", "-p", "dce"),
    ("xllm-run", "m.xir"),
    ("xllm-trace", "--help"),
    ("xllm-reduce", "--help"),
    ("xllm-bisect", "--help"),
    ("xllm-new-pass", "--help"),
    ("xllm-serve", "--help"),
)


@pytest.mark.parametrize("words", QUICK, ids=lambda words: "-".join(words[:2]))
def test_tools_in_a_directory_of_modules(trap: Path, words: tuple[str, ...]) -> None:
    code = 1 if "explain" in words else 0
    tool(trap, *words, code=code)


def test_tracing_the_checkpoint_one_stands_in(trap: Path) -> None:
    flags = ("--dtype", "float32", "-o")
    tool(trap, "xllm-trace", ".", *flags, str(trap.parent / "traced.xir"))


@pytest.mark.parametrize("spec", ["mine", "mine.py"])
def test_a_pass_that_is_asked_for_is_all_that_runs(trap: Path, spec: str) -> None:
    if spec == "mine.py":  # a file's own imports are found where Python looks, which is not here
        (trap / "mine.py").write_text(PASS.replace("import helper_of_mine\n", ""))
    printed = tool(trap, "xllm-opt", "m.xir", "--load", spec, "-p", "of-mine,dce", "--check-equiv")
    assert "t.neg" in printed
