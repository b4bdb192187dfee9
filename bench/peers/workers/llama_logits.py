"""Logits of llama.cpp on token ids: `llama_logits.py MODEL.gguf IDS.npy VOCAB OUT.npy`; ids [windows, tokens].

Prints the bits per weight of the file's matrices, scales included.
"""

from __future__ import annotations

import sys

import llama_cpp
import numpy as np
from gguf import GGUFReader


def bits(file: str) -> float:
    """Of the tensors of rank 2."""
    matrices = [t for t in GGUFReader(file).tensors if len(t.shape) > 1]
    return 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)


def main() -> None:
    """Every window is a sequence of its own from position 0; writes f32 [windows * tokens, vocab]."""
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {sys.argv[1]}")
    ids, vocab = np.load(sys.argv[2]), int(sys.argv[3])
    windows, tokens = ids.shape
    out = np.lib.format.open_memmap(sys.argv[4], "w+", np.float32, (windows * tokens, vocab))
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = tokens
    parameters.n_threads = parameters.n_threads_batch = 1
    batch = llama_cpp.llama_batch_init(tokens, 0, 1)
    for window, row in enumerate(ids):
        context = llama_cpp.llama_init_from_model(model, parameters)
        batch.n_tokens = tokens
        for at, token in enumerate(row):
            batch.token[at], batch.pos[at], batch.logits[at] = int(token), at, True
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}")
        logits = llama_cpp.llama_get_logits(context)  # of all tokens, since all were asked for
        out[window * tokens : (window + 1) * tokens] = np.ctypeslib.as_array(logits, (tokens, vocab))
        llama_cpp.llama_free(context)
    out.flush()
    print(bits(sys.argv[1]))


if __name__ == "__main__":
    main()
