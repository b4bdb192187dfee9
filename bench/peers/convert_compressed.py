"""Round a checkpoint to the compressed-tensors format that vLLM reads: `convert_compressed.py CHECKPOINT OUT 8|4`.

8: int8 per output channel, activations quantized per token as they come. 4: int4 in groups of 128, activations bf16.
Plain rounding; the vocabulary stays as it is, since vLLM reads no quantized one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GROUP = 128


def int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Symmetric, one scale per row."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return {f"{name}.weight": (weight / scale).round().clamp(-127, 127).to(torch.int8), f"{name}.weight_scale": scale}


def int4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Symmetric, one scale per group of a row; eight values to an int32, the first in the lowest bits, each plus 8."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-8) / 7
    values = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.int64).view(rows, columns // 8, 8)
    packed = (values << (4 * torch.arange(8))).sum(2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return {
        f"{name}.weight_packed": packed,
        f"{name}.weight_scale": scale.squeeze(2).to(torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }


def main() -> None:
    """Write OUT."""
    checkpoint, out, bits = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    out.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensor = opened.get_tensor(name)
                if name.endswith("_proj.weight"):
                    tensors.update((int8 if bits == 8 else int4)(name.removesuffix(".weight"), tensor.float()))
                else:
                    tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    if bits == 8:
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        group = {"targets": ["Linear"], "weights": {**weights, "strategy": "channel"}, "input_activations": activations}
    else:
        group = {"targets": ["Linear"], "weights": {**weights, "strategy": "group", "group_size": GROUP}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint / name, out / name)


if __name__ == "__main__":
    main()
