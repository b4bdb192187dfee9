"""Random damage to checkpoints: each compiles or is refused by a typed error that blames it, none is stuck, none is our
own fault."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_compiler.driver import read_request
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.model import build_model, load_config
from xllm_compiler.frontend.quantized import Quantized
from xllm_compiler.frontend.stored import check_weights, checkpoint_names, judge_leftovers, untie
from xllm_compiler.models.random_checkpoint import write_random_checkpoint
from xllm_compiler.options import CompileOptions
from xllm_compiler.targets.cpu import Cpu

SECONDS = 10
PER_KIND = 50
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 272,
    "max_position_embeddings": 64,
}

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**3, 10**5, 10**7, 10**12, 2**31, 2**63, 10**30, -(10**9)),
    *(0.0, 0.5, -1.5, 1e9, 1e300, float("inf"), "", "a", "32", "float16", "../..", "\x00", "é" * 50, "x" * 5000),
    *([], [0], [1, 2, 3], [None], ["a"], [[]], {}, {"a": 1}, {"rope_type": "yarn"}, {"type": "linear", "factor": "x"}),
    *({"quant_method": "gptq"}, {"quant_method": "awq", "bits": "4"}, {"config_groups": [1]}, {"rope_theta": None}),
)
KEYS = (
    *("rope_scaling", "rope_parameters", "rope_theta", "head_dim", "sliding_window", "layer_types", "text_config"),
    *("quantization_config", "compression_config", "quantization", "num_labels", "id2label", "tie_word_embeddings"),
    *("torch_dtype", "dtype", "attn_implementation", "auto_map", "model_type", "architectures", "hidden_act"),
    *("attention_bias", "mlp_bias", "pad_token_id", "eos_token_id", "bos_token_id", "transformers_weights"),
    *("partial_rotary_factor", "max_window_layers", "use_cache", "is_decoder", "is_encoder_decoder", "pruned_heads"),
    *("configuration_files", "original_max_position_embeddings", "return_dict", "problem_type", "name_or_path"),
)

Damage = Callable[[random.Random, Path], None]


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def config_value(r: random.Random, root: Path) -> None:
    """One or two settings of config.json."""

    def change(config: dict[str, Any]) -> None:
        for _ in range(r.choice((1, 1, 2))):
            key = r.choice((*config, *KEYS))
            if r.random() < 0.1:
                config.pop(key, None)
            else:
                config[key] = r.choice(VALUES)

    _edit(root / "config.json", change)


def generation_value(r: random.Random, root: Path) -> None:
    keys = ("eos_token_id", "bos_token_id", "pad_token_id", "temperature", "top_k", "top_p", "do_sample", "max_length")
    _edit(root / "generation_config.json", lambda g: {**g, r.choice(keys): r.choice(VALUES)})


def text(r: random.Random, root: Path) -> None:
    """Bytes of a JSON file."""
    name = r.choice(("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"))
    data = bytearray((root / name).read_bytes())
    match r.randrange(4):
        case 0:
            del data[r.randrange(len(data)) :]
        case 1:
            for _ in range(r.randrange(1, 4)):
                data[r.randrange(len(data))] = r.randrange(256)
        case 2:
            at = r.randrange(len(data))
            pieces = (b"{", b'"', b"[" * 5000, b"NaN", b"9" * 5000, b"\\ud800", b"\xef\xbb\xbf", b"\x00", b"//")
            data[at:at] = r.choice(pieces)
        case 3:
            data = bytearray(data.decode().encode("utf-16"))
    (root / name).write_bytes(data)


def header(r: random.Random, root: Path) -> None:
    """The description of one tensor, or bytes of the header."""
    file = root / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if r.random() < 0.4:
        data = bytearray(raw)
        for _ in range(r.randrange(1, 4)):
            data[r.randrange(length + 8)] = r.randrange(256)
        file.write_bytes(data)
        return
    table = json.loads(raw[8 : 8 + length])
    names = [n for n in table if n != "__metadata__"]
    name = r.choice(names)
    match r.randrange(6):
        case 0:
            table[name]["dtype"] = r.choice(("F32", "F16", "BF16", "I8", "I32", "F8_E4M3", "U32", "nope", 3, None))
        case 1:
            table[name]["shape"] = r.choice(([], [1], table[name]["shape"][::-1], [-1, 4], [2**40], ["a"], 5, None))
        case 2:
            table[name]["data_offsets"] = r.choice(([0, 0], [0, 4], [4, 0], [0, 2**60], [0.5, 1], [], None, [-4, 0]))
        case 3:
            renamed = (
                *names,
                "model.layers.2.x",
                "",
                "lm_head.bias",
                "a" * 4000,
                "model.layers.0.self_attn.q_proj.bias",
            )
            table[r.choice(renamed)] = table.pop(name)
        case 4:
            table[name] = r.choice(VALUES)
        case 5:
            table["__metadata__"] = r.choice(VALUES)
    out = json.dumps(table).encode()
    file.write_bytes(len(out).to_bytes(8, "little") + out + raw[8 + length :])


def shards(r: random.Random, root: Path) -> None:
    """The files of the weights: cut, longer, split under an index that is wrong."""
    file = root / "model.safetensors"
    match r.randrange(4):
        case 0:
            with file.open("r+b") as f:
                f.truncate(r.randrange(file.stat().st_size))
            return
        case 1:
            with file.open("ab") as f:
                f.write(bytes(r.randrange(1, 100)))
            return
        case _:
            raw = file.read_bytes()
            names = [n for n in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if n != "__metadata__"]
            index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}
            file.rename(root / "a.safetensors")
            places = ("b.safetensors", "../a", "x" * 300, "", "config.json", ".", "a\x00b", 3, None, ["a"])
            match r.randrange(5):
                case 0:
                    index["weight_map"][r.choice(names)] = r.choice(places)
                case 1:
                    index["weight_map"][r.choice(("more", *names))] = "a.safetensors"
                case 2:
                    index["weight_map"] = r.choice(VALUES)
                case 3:
                    index["metadata"] = r.choice(VALUES)
                case 4:
                    index = r.choice(VALUES)
            (root / "model.safetensors.index.json").write_text(json.dumps(index))


def other_files(r: random.Random, root: Path) -> None:
    """Settings and files that a checkpoint may have besides."""
    name = r.choice(("quantize_config.json", "quant_config.json", "hf_quant_config.json", "special_tokens_map.json"))
    settings = {"bits": 4, "group_size": 128, "quant_method": r.choice(("gptq", "awq", "nope"))}
    settings[r.choice(("bits", "group_size", "quant_method", "dynamic", "quantization", "sym", "modules"))] = r.choice(
        VALUES
    )
    (root / name).write_text(json.dumps(r.choice((settings, settings, r.choice(VALUES)))))
    if r.random() < 0.5:

        def change(config: dict[str, Any]) -> None:
            method = r.choice(("gptq", "awq", "fp8", "compressed-tensors", "fbgemm_fp8"))
            groups = {"g": {"weights": {"num_bits": 4}, "targets": ["Linear"], "format": "pack-quantized"}}
            inner: dict[str, Any] = {"quant_method": method, "bits": 4, "config_groups": groups}
            keys = ("bits", "dynamic", "config_groups", "sparsity_config", "transform_config", "weight_block_size")
            inner[r.choice((*keys, "ignore", "format", "version", "sym", "group_size"))] = r.choice(VALUES)
            config["quantization_config"] = inner

        _edit(root / "config.json", change)


KINDS: tuple[Damage, ...] = (config_value, generation_value, text, header, shards, other_files)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint("llama", tmp_path_factory.mktemp("sound") / "m", settings=SIZES)


def damaged(sound: Path, place: Path, kind: Damage, seed: int) -> Path:
    root = place / "m"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(sound, root)
    kind(random.Random(f"{kind.__name__} {seed}"), root)
    return root


def until_tracing(root: Path) -> None:
    """The phases of a compile that read the checkpoint, before the one that takes seconds."""
    request = read_request(root, CompileOptions(dtype="float32", target=Cpu(("avx2",))))
    quantized = Quantized.of(request.checkpoint)
    view = quantized.view
    model = build_model(load_config(view), "f32", request.options.max_model_len, view)
    names, leftovers = checkpoint_names(model, view)
    untie(model, names, view, quantized.weights)
    judge_leftovers(model, leftovers, view)
    check_weights(model, names, view)


def is_refused(what: str, root: Path, read: Callable[[Path], None] = until_tracing) -> bool:
    """Whether `read` says what is wrong with the damaged `root`; in time, and with no error but a typed one."""
    started = time.perf_counter()
    refused = False
    try:
        read(root)
    except XllmError as error:
        refused = True
        assert error.kind in ("checkpoint", "unsupported", "option", "io"), f"{what}: {error}"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert time.perf_counter() - started < SECONDS, what
    return refused


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damage_is_told_or_bearable(kind: Damage, sound: Path, tmp_path: Path) -> None:
    """300 of them; most are refused, some settings do not matter."""
    refused = sum(
        is_refused(f"{kind.__name__} {seed}", damaged(sound, tmp_path, kind, seed)) for seed in range(PER_KIND)
    )
    assert refused >= (0 if kind is generation_value else PER_KIND // 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damage_through_the_command_line(kind: Damage, sound: Path, tmp_path: Path) -> None:
    """Each refused with exit code 2 and a typed error, or compiled."""
    tool = Path(sys.executable).parent / "xllm-compile"
    for seed in range(PER_KIND, PER_KIND + 2):
        root = damaged(sound, tmp_path, kind, seed)
        command = [str(tool), str(root), "-o", str(tmp_path / f"out{seed}"), "--isas", "avx2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        said = f"{kind.__name__} {seed}: {done.stderr[-2000:]}"
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr and "internal" not in done.stderr, said
        assert done.returncode == 0 or "error[" in done.stderr, said
