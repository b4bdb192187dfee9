"""Run llama.cpp's converter on a tokenizer that it has never seen: `convert_llama.py VENDORED CHECKPOINT ...`.

The converter knows tokenizers by a hash of what they encode; ours is a byte-level BPE that splits text like Qwen2's.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Patch the lookup and run the script as it is."""
    vendored = Path(sys.argv[1])
    sys.path[:0] = [str(vendored), str(vendored / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = [str(vendored / "convert_hf_to_gguf.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
