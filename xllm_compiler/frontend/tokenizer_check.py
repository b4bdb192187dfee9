"""Whether the tokenizer that will be served does what transformers' own does, on texts chosen to show a difference.
Owns the texts and the comparison."""

from __future__ import annotations

from typing import Any

from xllm_compiler.errors import XllmError

TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\r\n\t",
    "\x00",
    "a\x00b",
    "Hello world",
    "  two leading and two trailing  ",
    "\n\nnew lines\n\n",
    "don't won't I'm they've , . ! ?",
    "ALLCAPS lower MiXed",
    "1 22 333 4444 55555 3.14159 -1e-9 0x7f",
    "def f(x):\n    return {'a': [x**2, \"b\"]}  # comment\n\treturn None\n",
    "http://a.b/c?d=e&f=%20#g user@example.org",
    "é e\u0301 ñ n\u0303 \u1100\u1161\u11a8 각",  # composed and combining
    "Ａ①ﬁ²½™",  # what NFKC changes
    "中文字符 日本語テキスト 한국어",
    "שלום עולם مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️",
    "\u200b\u200d\ufeff\u00a0\u2028\u3000",
    "\U0001f9ff\U00020000\U0010fffd",
    "a" * 300,
    " " * 300,
    "ab " * 100,
    "▁ ▁▁ Ġ Ċ ## </w> <0x41>",
    "<s> </s> <unk> <|endoftext|> <|im_start|>user\nhi<|im_end|> [CLS] [SEP] [INST] <pad>",
)
_SPECIALS_TRIED = 24


def check_same(loaded: Any, served: Any, where: str) -> list[str]:
    """Notes about differences that do not matter to a server. Raises XllmError("unsupported") for other tokens, or
    another text of the same tokens, than `loaded`, transformers' tokenizer, has."""
    names = list(dict.fromkeys([*loaded.all_special_tokens, *map(str, loaded.added_tokens_decoder.values())]))
    tried = names[:_SPECIALS_TRIED]
    texts = [*TEXTS, *(f"x{name} y" for name in tried), *(f" {name}{name}\n" for name in tried[:8])]
    notes: list[str] = []
    for text in texts:
        for special in (True, False):
            theirs = list(loaded(text, add_special_tokens=special)["input_ids"])
            ours = served.encode(text, add_special_tokens=special).ids
            if theirs != ours:
                raise _differs(f"the tokens of {text[:60]!r}", theirs[:12], ours[:12], where)
            for skip in (True, False):
                wanted = loaded.decode(ours, skip_special_tokens=skip)
                got = served.decode(ours, skip_special_tokens=skip)
                if wanted == got or notes:
                    continue
                if wanted != loaded.decode(ours, skip_special_tokens=skip, clean_up_tokenization_spaces=False):
                    notes.append(
                        "the tokenizer's clean_up_tokenization_spaces is left out: text is given out as it grows, and "
                        "what was shown cannot lose a space later"
                    )
                else:
                    raise _differs(f"the text of tokens {ours[:12]}", wanted[:60], got[:60], where)
    return notes


def _differs(what: str, theirs: object, ours: object, where: str) -> XllmError:
    return XllmError(
        "unsupported",
        f"the fast form of the tokenizer differs from transformers': {what} would be {ours!r}, not {theirs!r}",
        where=where,
        help="save the tokenizer with a fast tokenizer class, so that the checkpoint has a tokenizer.json",
    )
