"""A pass in another process, where hashes of strings are others. Owns both ends of that: asking, and answering.

python -m xllm_compiler.testing.laws_child SPEC PASS     # texts as JSON on standard input, digests on standard output
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.passes.base import Pass
from xllm_compiler.passes.manager import item_text, parse_pipeline
from xllm_compiler.passes.registry import BUILTIN, load_passes
from xllm_compiler.testing.laws_trial import run_pass

SECONDS: Final = 120  # a child that takes longer hangs
SEEDS: Final = ("1", "2")  # of which the one that is not ours is used


def load_spec(cls: type[Pass]) -> str:
    """What `load_passes`, and --load of the tools, need to know the pass in a new process; "" for our own passes."""
    if BUILTIN.get(cls.name) and cls.__module__ == f"xllm_compiler.passes.{BUILTIN[cls.name]}":
        return ""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    top = cls.__module__.partition(".")[0]
    # Not importlib.util.find_spec: that finds what is imported already, files loaded by their path among them.
    if importlib.machinery.PathFinder.find_spec(top, [*sys.path, os.getcwd()]) is not None:
        return cls.__module__
    return str(file or cls.__module__)


def digests_elsewhere(p: Pass, texts: Sequence[str]) -> list[str]:
    """A digest of what `p` makes of each text in a process with another hash seed. XllmError where that fails."""
    seed = next(s for s in SEEDS if s != os.environ.get("PYTHONHASHSEED"))
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-P", "-m", "xllm_compiler.testing.laws_child", load_spec(type(p)), item_text(p)]
    try:
        done = subprocess.run(
            words, input=json.dumps(list(texts)), env=env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise XllmError("internal", f"pass {item_text(p)} is not done after {SECONDS} s in another process") from None
    if done.returncode != 0:
        raise XllmError(
            "option",
            f"pass {item_text(p)} cannot be run in a new process",
            where=done.stderr.strip()[-2000:],
            help="define the pass in a module or a .py file that can be imported by itself",
        )
    answer: list[str] = json.loads(done.stdout)
    return answer


def digests(p: Pass, texts: Sequence[str]) -> list[str]:
    """A digest of what `p` makes of each text in this process."""
    out = []
    for text in texts:
        outcome = run_pass(p, parse_module(text))
        told = (
            [str(outcome.error)] if outcome.error is not None else [outcome.text, str(outcome.stats), *outcome.remarks]
        )
        out.append(hashlib.sha256("\n".join(told).encode()).hexdigest())
    return out


def main(argv: Sequence[str]) -> int:
    """Answers on standard output."""
    spec, setting = argv
    if spec:
        load_passes(spec)
    (p,) = parse_pipeline(setting).passes()
    print(json.dumps(digests(p, json.load(sys.stdin))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
