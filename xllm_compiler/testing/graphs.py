"""Random well-typed modules for property tests and the corpus. Owns their outline; must not know any test framework.

The caller supplies `choose(n)`, an integer in 0..n-1 (hypothesis' draw, or random.randrange), so that shrinking is the
caller's. Inputs for them come from inputs.py, like those of any other module.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_compiler.ir.core import Module
from xllm_compiler.testing.idioms import IDIOMS
from xllm_compiler.testing.sketch import DTYPES, HEADS, Choose, Sketch


def random_module(choose: Choose, size: int = 12, ranks: Sequence[int] = (1, 2, 4)) -> Module:
    """A module over i32 token arrays, a float stream, kv caches and cells; it verifies. @step, and sometimes @draft.

    Symbols N (tokens), B (requests), P (pages), Q (slots), S (sampled rows), C (another length), as
    needed. Up to `size` idioms of
    a few ops each, most of them on the newest values. `ranks`: the sizes that its groups may have, all the same one.
    """
    module = Module()
    width = ranks[choose(len(ranks))]
    for name in ("step", "draft")[: 1 + (choose(6) == 1)]:
        sketch = Sketch(choose, module.add_func(name), DTYPES[choose(len(DTYPES))], HEADS[choose(len(HEADS))], width)
        for _ in range(size):
            IDIOMS[choose(len(IDIOMS))](sketch)
            if choose(size) == 0:  # asked each time, so that shrinking can leave any idiom out
                break
        sketch.finish()
    return module
