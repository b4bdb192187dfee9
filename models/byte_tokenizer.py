"""Byte-level BPE tokenizers in Hugging Face form, trained on text or padded to any vocabulary size.

Owns the files tokenizer.json, tokenizer_config.json and chat_template.jinja of the checkpoints this project makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from xllm_compiler.errors import XllmError

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, TURN_START, TURN_END)
"""They take ids 0, 1 and 2 in every tokenizer made here."""

_HERE = Path(__file__).resolve().parent


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries, specials included, learned from `texts`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def padded_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer in which every id below `vocab_size` decodes to some text and every text encodes.

    The bundled model's merges are used as far as they fit; what remains is filled with entries that encoding never
    produces. Raises XllmError("option") below the 259 entries that bytes and specials need.
    """
    needed = len(SPECIALS) + 256
    if vocab_size < needed:
        raise XllmError("option", f"a byte-level tokenizer needs at least {needed} entries, got {vocab_size}")
    bundled = json.loads((_HERE / "bundled" / "tokenizer.json").read_text(encoding="utf-8"))
    by_id = sorted(bundled["model"]["vocab"].items(), key=lambda item: item[1])
    kept = dict(by_id[:vocab_size])
    merges = [tuple(pair) for pair in bundled["model"]["merges"] if all(p in kept for p in (*pair, "".join(pair)))]
    for index in range(len(kept), vocab_size):
        kept[f"<filler{index}>"] = index
    tokenizer = Tokenizer(BPE(vocab=kept, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, out_dir: Path, max_length: int) -> None:
    """Write the tokenizer files into `out_dir` the way transformers reads them."""
    tokenizer.save(str(out_dir / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    template = (_HERE / "chat_template.jinja").read_text(encoding="utf-8")
    (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
