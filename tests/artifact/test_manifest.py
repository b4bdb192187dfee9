"""The manifest's own rules: strict reading, canonical text, an id that covers everything."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from sample_manifest import sample

from xllm_compiler.artifact import FORMAT, DimRange, FileEntry, Limits, Manifest, Weight, Weights
from xllm_compiler.artifact.rules import read_text
from xllm_compiler.artifact.schema import canonical_json
from xllm_compiler.errors import XllmError
from xllm_compiler.step.interface import Program, TensorSpec

FILES = {
    name: FileEntry(256, "ab" * 16)
    for name in ("module.xir", "weights.bin", "calls.json", "cpu/avx2.so", "cpu/avx512.so", "tokenizer.json")
}


def from_json(text: str) -> Manifest:
    return read_text(text.encode())


def sealed() -> Manifest:
    return replace(sample(), files=FILES).with_id()


def test_round_trip_and_id() -> None:
    manifest = sealed()
    text = manifest.to_json()
    assert from_json(text) == manifest
    value = json.loads(text)
    assert text == json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    given = value.pop("id")
    assert given == hashlib.sha256((json.dumps(value, sort_keys=True, indent=1) + "\n").encode()).hexdigest()


def test_every_flipped_bit_is_found() -> None:
    """Every eleventh bit, so each position in a byte: an error each time and never another exception."""
    data = sealed().to_json().encode()
    bits = range(0, len(data) * 8, 11)
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            text = bytes(flipped).decode()
        except UnicodeDecodeError:
            continue
        with pytest.raises(XllmError) as caught:
            from_json(text)
        assert caught.value.kind == "artifact"


def test_same_content_in_other_text_is_refused() -> None:
    value = json.loads(sealed().to_json())
    with pytest.raises(XllmError, match="canonical"):
        from_json(json.dumps(value))


def test_duplicate_key_is_refused() -> None:
    text = sealed().to_json()
    with pytest.raises(XllmError):
        from_json(text.replace('"format":', f'"format": {FORMAT},\n "format":'))


@pytest.mark.parametrize("version", [0, FORMAT - 1, FORMAT + 1, str(FORMAT), True, float(FORMAT), None])
def test_other_format_version_names_both(version: Any) -> None:
    value = json.loads(sealed().to_json())
    value["format"] = version
    value["surprise"] = "a later version may have more"
    with pytest.raises(XllmError) as caught:
        from_json(canonical_json(value))
    assert caught.value.kind == "artifact"
    if version not in (True, float(FORMAT)):
        assert f"format {FORMAT}" in str(caught.value) and repr(version) in str(caught.value)
        assert "compile the checkpoint again" in caught.value.help


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("model", "vocab_size"), True, "integer"),
        (("model", "vocab_size"), 300.0, "integer"),
        (("model", "vocab_size"), 2**63, "integer"),
        (("model", "vocab_size"), "300", "integer"),
        (("model", "vocab_size"), None, "integer"),
        (("model", "bos_token_id"), "x", "integer"),
        (("model", "name"), 3, "string"),
        (("model", "extra"), 3, "unknown 'extra'"),
        (("target", "levels"), "avx2", "list"),
        (("target", "levels"), {"avx2": 1}, "list"),
        (("dims", "N"), [1, 2], "object"),
        (("dims",), [], "object"),
        (("states", "kv0"), {"kind": "kv"}, "missing 'dtype', 'layout', 'sizes'"),
        (("functions", "step", "states"), "kv0", "list"),
        (("key", "option.x"), 2**70, "integer"),
    ],
)
def test_types_are_exact(path: tuple[str, ...], value: Any, match: str) -> None:
    root = json.loads(sealed().to_json())
    node = root
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    with pytest.raises(XllmError, match=match) as caught:
        from_json(canonical_json(root))
    assert caught.value.kind == "artifact"
    assert path[0] in caught.value.where


def broken(**changes: Any) -> Manifest:
    return replace(sealed(), **changes)


def changed(**changes: Any) -> Manifest:
    """With another @step."""
    return broken(functions={"step": replace(sample().functions["step"], **changes)})


def row(name: str, offset: int, size: int) -> Weight:
    return Weight(name, "row", "bf16", (size // 2,), offset, size)


RANGES = sample().dims


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        (broken(dims={**RANGES, "N": DimRange(5, 4, "")}), "empty"),
        (broken(dims={name: RANGES[name] for name in "NBS"}), "P has no range"),
        (broken(dims={**RANGES, "N": DimRange(1, 31, "")}), "differs from the limit"),
        (broken(limits=Limits(4, 2, 8), dims={**RANGES, "N": DimRange(1, 2, "")}), "less than 4"),
        (changed(inputs=(TensorSpec("ids", "i32", ("Q + 1",)),)), "uses Q"),
        (changed(inputs=(TensorSpec("ids", "i32", ("N +",)),)), "not a dim"),
        (changed(inputs=(TensorSpec("ids", "i33", ("N",)),)), "i33"),
        (changed(inputs=(TensorSpec("ids", "i32", ()), TensorSpec("ids", "i32", ()))), "twice"),
        (changed(programs=()), "none"),
        (changed(programs=(Program("xllm_fn_f", ("8 - N",), "0"),)), "last program"),
        (changed(programs=(Program("f; rm", (), "0"),)), "no program"),
        (changed(programs=(Program("xllm_fn_f", ("8 - N",), "0"), Program("xllm_fn_f", (), "0"))), "twice"),
        (changed(programs=(Program("xllm_fn_f", (), "4*N*Q"),)), "uses Q"),
        (changed(states=("kv2",)), "table of states"),
        (broken(weights=Weights(256, (row("a", 0, 128), row("b", 64, 128)))), "inside a"),
        (broken(weights=Weights(256, (row("a", -64, 32),))), "negative"),
        (broken(weights=Weights(256, (Weight("a", "row", "bf16", (8, 8), 0, 126),))), "do not hold"),
        (broken(weights=Weights(256, (row("a", 0, 128), row("b", 192, 128)))), "ends at 320"),
        (broken(weights=Weights(250, (row("a", 0, 128),))), "the table says 250"),
        (broken(weights=Weights(256, (row("a", 0, 128), row("a", 128, 128)))), "twice"),
        (broken(files={n: e for n, e in FILES.items() if n != "cpu/avx512.so"}), "cpu/avx512.so is not listed"),
        (broken(files={**FILES, "../x": FileEntry(1, "ab" * 16)}), "inside the artifact"),
        (broken(files={**FILES, "/etc/x": FileEntry(1, "ab" * 16)}), "inside the artifact"),
        (broken(files={**FILES, "manifest.json": FileEntry(1, "ab" * 16)}), "inside the artifact"),
        (broken(files={**FILES, "x": FileEntry(1, "AB" * 16)}), "digest"),
        (broken(files={**FILES, "x": FileEntry(-1, "ab" * 16)}), "less than 0"),
    ],
)
def test_rules(manifest: Manifest, match: str) -> None:
    with pytest.raises(XllmError, match=match) as caught:
        from_json(manifest.with_id().to_json())
    assert caught.value.kind == "artifact"


def test_formulas_at_the_limits() -> None:
    manifest = sealed()
    assert manifest.limit_values(7) == {"N": 32, "B": 4, "S": 8, "P": 7}
    limits = manifest.limit_values(7)
    assert manifest.arena_bytes(limits) == 256 * 32 + 64, "the largest of its programs"
    assert manifest.output_bytes(limits) == 8 * 300 * 4
    assert (manifest.page_bytes, manifest.page_tokens) == (8192, 16)
