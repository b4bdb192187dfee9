"""Train the bundled model: a small Qwen3 that writes Python, learned from the standard library.

    python -m xllm_compiler.models.train --out models/bundled

Everything that decides the result is in this file and `corpus.py`; the seed, the command and the held-out loss are
written into the model's README. Not a training framework: one model, one run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from xllm_compiler.models.byte_tokenizer import END_OF_TEXT, TURN_END, TURN_START, train_tokenizer, write_tokenizer
from xllm_compiler.models.corpus import SourceFile, Turn, chat_turns, python_version, source_files

CONTEXT = 512
VOCAB = 4096


def model_config() -> Qwen3Config:
    """Qwen3 with grouped queries, per-head q/k norms and tied embeddings, small enough to live in git."""
    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def render_turn(turn: Turn) -> str:
    """The same text that the chat template makes of the two messages."""
    return f"{TURN_START}user\n{turn.user}{TURN_END}\n{TURN_START}assistant\n{turn.assistant}{TURN_END}\n{END_OF_TEXT}"


def token_stream(tokenizer: Tokenizer, files: list[SourceFile], seed: int) -> np.ndarray:
    """All documents and turns of `files`, shuffled by `seed` and joined: uint16 [tokens]."""
    documents = [file.text + END_OF_TEXT for file in files]
    documents += [render_turn(turn) for file in files for turn in chat_turns(file)]
    random.Random(seed).shuffle(documents)
    encoded = tokenizer.encode_batch(documents)
    return np.concatenate([np.asarray(item.ids, dtype=np.uint16) for item in encoded])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 % of the steps, then cosine decay to a twentieth of the peak."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_at(stream: np.ndarray, rng: np.random.Generator, rows: int) -> torch.Tensor:
    """`rows` random windows of CONTEXT + 1 tokens: int64 [rows, CONTEXT + 1]."""
    starts = rng.integers(0, len(stream) - CONTEXT - 1, rows)
    return torch.from_numpy(np.stack([stream[s : s + CONTEXT + 1] for s in starts]).astype(np.int64))


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, stream: np.ndarray, windows: int) -> float:
    """Mean next-token loss in nats over up to `windows` consecutive windows of `stream`."""
    model.eval()
    losses = []
    for index in range(min(windows, (len(stream) - 1) // CONTEXT)):
        piece = stream[index * CONTEXT : (index + 1) * CONTEXT + 1].astype(np.int64)
        ids = torch.from_numpy(piece)[None]
        logits = model(input_ids=ids[:, :-1]).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item())
    model.train()
    return float(np.mean(losses))


def train(out: Path, steps: int, rows: int, peak: float, seed: int, command: str) -> None:
    """Train for `steps` batches of `rows` windows and write the checkpoint, in bf16, to `out`."""
    torch.manual_seed(seed)
    files = source_files()
    training = [file for file in files if not file.held_out]
    held_out = [file for file in files if file.held_out]
    tokenizer = train_tokenizer((file.text for file in training), VOCAB)
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, out, model_config().max_position_embeddings)
    stream = token_stream(tokenizer, training, seed)
    held_stream = token_stream(tokenizer, held_out, seed)
    held_bytes = sum(len(file.text.encode()) for file in held_out)
    print(
        f"{len(training)} files, {len(stream):,} tokens; held out: {len(held_out)} files, {len(held_stream):,} tokens"
    )

    model = Qwen3ForCausalLM(model_config())
    parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
    )
    rng = np.random.default_rng(seed)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        ids = batch_at(stream, rng, rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            rate = (step + 1) * rows * CONTEXT / (time.monotonic() - started)
            print(f"step {step}/{steps} loss {loss.item():.3f} {rate:,.0f} tokens/s", flush=True)

    model = model.to(torch.bfloat16)
    final = held_out_loss(model, held_stream, 200)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[2, 0], pad_token_id=0
    )
    model.save_pretrained(out)
    record = {
        "command": command,
        "seed": seed,
        "steps": steps,
        "tokens_seen": steps * rows * CONTEXT,
        "parameters": parameters,
        "held_out_loss": round(final, 4),
        "python": python_version(),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "README.md").write_text(_readme(record, len(held_out), held_bytes))
    print(json.dumps(record, indent=2))


def _readme(record: dict[str, object], files: int, held_bytes: int) -> str:
    return f"""# The bundled model

A Qwen3 of {record["parameters"]:,} parameters (bf16) that has read the source of Python {record["python"]}'s standard
library and the docstrings of its functions as chat turns. It is here so that the demo and the tests have real weights
and no network. It writes text that looks like Python; it knows nothing.

| | |
|---|---|
| command | `{record["command"]}` |
| seed | {record["seed"]} |
| steps, tokens seen | {record["steps"]}, {record["tokens_seen"]:,} |
| held-out loss (bf16) | {record["held_out_loss"]} nats a token |
| held out | {files} files ({held_bytes:,} bytes) never trained on |
| made with | Python {record["python"]}, torch {record["torch"]} |
"""


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=8, help=f"windows of {CONTEXT} tokens in a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=20260101)
    options = parser.parse_args()
    command = (
        f"python -m xllm_compiler.models.train --out {options.out} --steps {options.steps} --rows {options.rows} "
        f"--learning-rate {options.learning_rate} --seed {options.seed}"
    )
    train(options.out, options.steps, options.rows, options.learning_rate, options.seed, command)


if __name__ == "__main__":
    main()
