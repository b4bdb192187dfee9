"""Whether the tokenizer that will be served does what transformers' own does, on texts chosen to show a difference, and
whether any text brings it down. Owns the texts and the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xllm_compiler.confined import Confined, Limits, Overrun, Refusal
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

_RUNS = ("a", "A", "x", "1", " ", "\n", ".", "-", "é", "中", "_", "aA", "a ", " \n", "0x", "'s", "a.", "👍")
_TAILS = ("", "!", "b", "\n")
_RUN_CHARACTERS = 2000
_RUN_SECONDS = 2.0
_LOADING = Limits(cpu=120.0, wall=300.0, memory=16 * 2**30)  # of vocabularies of hundreds of thousands of tokens


def check_same(loaded: Any, served: Any, where: str) -> list[str]:
    """Notes about differences that do not matter to a server. Raises XllmError("unsupported") for other tokens, or
    another text of the same tokens, than `loaded`, transformers' tokenizer, has."""
    names = list(dict.fromkeys([*loaded.all_special_tokens, *map(str, loaded.added_tokens_decoder.values())]))
    tried = names[:_SPECIALS_TRIED]
    texts = [*TEXTS, *(f"x{name} y" for name in tried), *(f" {name}{name}\n" for name in tried[:8])]
    notes: list[str] = []
    for text in texts:
        for special in (True, False):
            try:
                theirs = list(loaded(text, add_special_tokens=special)["input_ids"])
            except Exception:
                continue  # a text for which it has no tokens; `check_encodes` tells of that
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


def note_rebuilt(loaded: Any, served: Any, path: Path) -> list[str]:
    """A note when the tokenizer's class makes other tokens than the tokenizer.json at `path` does by itself."""
    from tokenizers import Tokenizer

    alone = Tokenizer.from_file(str(path))
    alone.no_padding()
    alone.no_truncation()
    for text in TEXTS:
        try:
            theirs, ours = (core.encode(text, add_special_tokens=False).ids for core in (alone, served))
        except Exception:
            continue
        if theirs != ours:
            return [
                f"the tokenizer is the one that transformers' {type(loaded).__name__} makes of the checkpoint; "
                f"tokenizer.json alone has other tokens, such as {theirs[:6]} rather than {ours[:6]} for {text[:30]!r}"
            ]
    return []


def check_encodes(tokenizer: str, where: str) -> list[str]:
    """A pattern can take exponential time, or give up, on a text that means it harm. Encodes such texts with
    `tokenizer`, a tokenizer.json, in a child process; a note when it has no tokens for some. Raises
    XllmError("unsupported") with the text that was too much."""
    child = Confined("encoding", ("tokenizers",), _LOADING, ("load", tokenizer))
    notes: list[str] = []
    try:
        child.opened()
        for run in _RUNS:
            for tail in _TAILS:
                text = run * (_RUN_CHARACTERS // len(run)) + tail
                try:
                    child.call("encode", text, cpu=_RUN_SECONDS)
                except Overrun:
                    raise _brings_down(run, tail, f"takes more than {_RUN_SECONDS:g} s", where) from None
                except Refusal as error:
                    if error.kind == "PanicException":
                        raise _brings_down(run, tail, f"fails: {str(error)[:200]}", where) from None
                    notes = notes or [f"the tokenizer has no tokens for some texts, such as {run!r}: {error}"]
    except (Refusal, Overrun) as error:
        raise XllmError("checkpoint", f"the tokenizer cannot be read: {error}", where=where) from None
    finally:
        child.close()
    return notes


def _brings_down(run: str, tail: str, how: str, where: str) -> XllmError:
    return XllmError(
        "unsupported",
        f"encoding {run!r} repeated to {_RUN_CHARACTERS} characters{f' and {tail!r}' if tail else ''} {how}",
        where=where,
        help="the tokenizer's pattern backtracks without bound; write it without nested repetition",
    )
