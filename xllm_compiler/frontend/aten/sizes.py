"""Sizes: reading them from tensors, and Python arithmetic on them. Asserts about them are dropped here."""

from __future__ import annotations

from xllm_compiler.dims import Dim, as_dim, dmax, dmin
from xllm_compiler.frontend.importer import Importer, Item, handles
from xllm_compiler.ir.core import Value


@handles("aten.sym_size.int")
def sym_size(im: Importer, x: Value, dim: int) -> Dim:
    return x.shape[dim]


@handles("aten.sym_numel.default")
def sym_numel(im: Importer, x: Value) -> Dim:
    return x.tensor.elements


@handles("add")
def add(im: Importer, a: Item, b: Item) -> Dim:
    return im.size(a) + im.size(b)


@handles("sub")
def sub(im: Importer, a: Item, b: Item) -> Dim:
    return im.size(a) - im.size(b)


@handles("mul")
def mul(im: Importer, a: Item, b: Item) -> Dim:
    return im.size(a) * im.size(b)


@handles("floordiv")
def floordiv(im: Importer, a: Item, b: Item) -> Dim:
    return im.size(a) // im.size(b)


@handles("mod")
def mod(im: Importer, a: Item, b: Item) -> Dim:
    return im.size(a) % im.size(b)


@handles("neg")
def neg(im: Importer, a: Item) -> Dim:
    return -im.size(a)


@handles("sym_max")
def sym_max(im: Importer, a: Item, b: Item) -> Dim:
    return dmax(im.size(a), im.size(b))


@handles("sym_min")
def sym_min(im: Importer, a: Item, b: Item) -> Dim:
    return dmin(im.size(a), im.size(b))


@handles("getitem")
def getitem(im: Importer, items: list[Item], index: int) -> Item:
    return items[index]


def _truth(im: Importer, relation: str, a: Item, b: Item) -> bool:
    """A comparison of sizes that the model branched on while it was traced: it must hold for every step."""
    x, y = im.size(a), im.size(b)
    scope = im.b.func.module.scope
    answer = {
        "eq": lambda: scope.prove_eq(x, y),
        "le": lambda: scope.prove_le(x, y),
        "lt": lambda: scope.prove_le(x + 1, y),
    }[relation]()
    if answer is None:
        raise im.unsupported(f"the model decides whether {x} {relation} {y}, which differs from step to step")
    return answer


@handles("eq")
def eq(im: Importer, a: Item, b: Item) -> bool:
    return _truth(im, "eq", a, b)


@handles("le")
def le(im: Importer, a: Item, b: Item) -> bool:
    return _truth(im, "le", a, b)


@handles("lt")
def lt(im: Importer, a: Item, b: Item) -> bool:
    return _truth(im, "lt", a, b)


@handles("ge")
def ge(im: Importer, a: Item, b: Item) -> bool:
    return _truth(im, "le", b, a)


@handles("gt")
def gt(im: Importer, a: Item, b: Item) -> bool:
    return _truth(im, "lt", b, a)


@handles("aten._assert_tensor_metadata.default")
def assert_metadata(im: Importer, **_: Item) -> None:
    """A check of dtypes that tracing leaves behind; types here are inferred again anyway."""
    return None


@handles("aten._assert_scalar.default", "aten.sym_constrain_range_for_size.default")
def assert_scalar(im: Importer, **_: Item) -> None:
    """Whatever it was about: `_truth` has refused it if it was not certain."""
    return None


def as_list(im: Importer, value: Item) -> list[Dim]:
    """A list of sizes."""
    return [im.size(v) for v in value] if isinstance(value, (list, tuple)) else [as_dim(im.size(value))]
