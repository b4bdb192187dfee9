"""The checkpoints that the project makes are ordinary Hugging Face checkpoints: transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from xllm_compiler.errors import XllmError
from xllm_compiler.models.byte_tokenizer import padded_tokenizer
from xllm_compiler.models.corpus import SourceFile, Turn, chat_turns, source_files
from xllm_compiler.models.random_checkpoint import TINY, main, write_random_checkpoint
from xllm_compiler.models.train import held_out_loss, render_turn, token_stream

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"


def test_bundled_model_reads_like_any_checkpoint() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    text = "def read_lines(path):\n    return open(path).readlines()  # naïve ✓\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == 2
    size = sum(path.stat().st_size for path in BUNDLED.iterdir())
    assert size < 16 * 2**20


def test_bundled_model_has_learned_python() -> None:
    """Guessing gives log(4096) = 8.3 nats a token; the weights do far better on files they were never trained on."""
    record = json.loads((BUNDLED / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    held_out = [file for file in source_files() if file.held_out]
    stream = token_stream(Tokenizer.from_file(str(BUNDLED / "tokenizer.json")), held_out, record["seed"])
    assert held_out_loss(model, stream, 20) < 4.5
    assert record["held_out_loss"] < 4.0


def test_chat_template_is_what_the_model_was_trained_on() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    messages = [{"role": "user", "content": "Write f."}, {"role": "assistant", "content": "def f(): ..."}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert render_turn(Turn("Write f.", "def f(): ...")) == rendered + "<|endoftext|>"
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(opened)


def test_turns_ask_for_documented_functions_only() -> None:
    text = 'def a(x, y=1):\n    """Add.\n\n    More.\n    """\n    return x + y\n\ndef b():\n    return 1\n'
    (turn,) = chat_turns(SourceFile("m.py", text))
    assert turn.user == "Write a Python function `a(x, y=1)`. Add."
    assert turn.assistant.startswith("def a(x, y=1):")


def test_random_checkpoint_is_a_function_of_its_seed(tmp_path: Path) -> None:
    one = load_file(write_random_checkpoint("llama", tmp_path / "a", seed=1) / "model.safetensors")
    same = load_file(write_random_checkpoint("llama", tmp_path / "b", seed=1) / "model.safetensors")
    other = load_file(write_random_checkpoint("llama", tmp_path / "c", seed=2) / "model.safetensors")
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not all(np.array_equal(one[name], other[name]) for name in one)
    assert one["model.norm.weight"].std() > 0.01, "norm scales must not all be 1, or a lost scale would not show"


def test_random_checkpoint_has_a_tokenizer_for_every_id(tmp_path: Path) -> None:
    write_random_checkpoint("qwen2", tmp_path, settings={**TINY, "vocab_size": 5000}, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 5000
    assert tokenizer.decode([4999]) == "<filler4999>"
    assert tokenizer.decode(tokenizer("été = 1")["input_ids"]) == "été = 1"


def test_errors_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(XllmError, match="at least 259"):
        padded_tokenizer(100)
    assert main(["no-such-family", "-o", str(tmp_path)]) == 2
    assert "no-such-family" in capsys.readouterr().err
