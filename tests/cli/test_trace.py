"""`xllm-trace`: what is refused before torch is imported, and that a config alone traces like its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xllm_compiler.ir.parser import parse_module
from xllm_compiler.tools.opt import main as opt
from xllm_compiler.tools.trace import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 384,
    "max_position_embeddings": 128,
}
LIMITS = ["--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--max-num-logits", "8"]

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cfg").mkdir()
    Path("cfg/config.json").write_text(json.dumps(CONFIG))


def test_a_config_traces_like_its_checkpoint_and_pipes_into_opt(capsys: Capture) -> None:
    from xllm_compiler.models.random_checkpoint import write_random_checkpoint

    settings = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type", "dtype")}
    write_random_checkpoint("llama", Path("whole"), settings=settings, dtype="bfloat16")
    assert main(["whole", *LIMITS, "-o", "whole.xir"]) == 0
    assert main(["whole/config.json", *LIMITS]) == 0
    text = capsys.readouterr().out
    assert text == Path("whole.xir").read_text() and ": bf16[" in text
    module = parse_module(text)
    assert {name: s.hi for name, s in module.scope.symbols.items()} == {"N": 32, "B": 4, "S": 8, "P": 1 << 24}
    assert opt(["whole.xir", "-p", "@cpu"]) == 0
    assert "kv.append(" in capsys.readouterr().out


def test_a_pipeline_and_locs(capsys: Capture) -> None:
    assert main(["cfg", *LIMITS, "--dtype", "float32", "--pipeline", "import-clean,fold,cse", "--loc"]) == 0
    text = capsys.readouterr().out
    assert 'loc("transformers/models/llama/modeling_llama.py":' in text and "bf16" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "error[checkpoint]: there is no such checkpoint\n  at nowhere\n"),
        (["."], "error[checkpoint]: config.json is missing\n  at config.json\n"),
        (["cfg/other.json"], "error[checkpoint]: there is no such checkpoint\n"),
        (["file.txt"], "error[checkpoint]: file.txt is no GGUF file\n  at file.txt\n  help: give a Hugging Face"),
        (["bad"], "error[checkpoint]: config.json is not valid JSON: "),
        (["pickled"], "error[checkpoint]: the weights are not safetensors but pytorch_model.bin\n"),
        (["cfg", "--dtype", "f8"], "error[option]: --dtype 'f8' is not known\n  help: choose from float32, bfloat16"),
        (["cfg", "--max-num-logits", "0"], "error[option]: --max-num-logits 0 is out of range\n"),
        (["cfg", "--max-num-seqs", "x"], "error[option]: argument --max-num-seqs: 'x' is not a whole number"),
        (["cfg", "--max-model-len", "4096"], "error[option]: --max-model-len 4096 is more than the 128 positions"),
        (["cfg", "--pipeline", "flod"], "error[option]: there is no pass called 'flod'\n  help: did you mean 'fold'?"),
        (["cfg", "--pipelin", "fold"], "error[option]: xllm-trace has no flag --pipelin\n  help: did you mean --pipe"),
        ([], "error[option]: the following arguments are required: CHECKPOINT\n"),
    ],
)
def test_what_is_refused(argv: list[str], message: str, capsys: Capture) -> None:
    Path("file.txt").write_text("")
    for name, text in (("bad", "{"), ("pickled", "{}")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    Path("pickled", "pytorch_model.bin").write_text("")
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message)
