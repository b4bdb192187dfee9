"""A checkpoint in 16, 8 and 4 bits: sizes, what was lost, and an answer of each.

python examples/quantize.py [CHECKPOINT] [FOLDER]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from xllm_compiler import LLM, SamplingParams


def main(checkpoint: str, folder: Path) -> None:
    for form in (None, "int8", "int4"):
        artifact = folder / (form or "plain")
        flags = [] if form is None else ["--quantize", form]
        subprocess.run(["xllm-compile", checkpoint, "-o", artifact, *flags], check=True, stderr=subprocess.DEVNULL)
        print(f"--- {form or 'as it is'}: weights of {(artifact / 'weights.bin').stat().st_size / 2**20:.1f} MiB")
        if form is not None:
            lost = json.loads((artifact / "quantization.json").read_text())["total"]
            print(f"KL divergence {lost['kl']:.2g} nats, same most likely token {lost['top1']:.1%}")
        with LLM(artifact) as llm:
            [result] = llm.generate("def add(a, b):", SamplingParams(temperature=0, max_tokens=24))
        print(result.outputs[0].text)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0] if given else "models/bundled", Path(given[1] if len(given) > 1 else "artifacts"))
