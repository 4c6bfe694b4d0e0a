"""A mark on the product of a compressed weight, for who reads the program afterwards.

The op of a weight's format multiplies codes and applies scales, so the result of no single
primitive is the product. Where somebody asks, the rules bind one that says so.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from jax.extend.core import Primitive

__all__ = ["mark", "marking", "product_p"]

# Exists in jaxprs only, to be read and dropped: it has no lowering and no derivative.
product_p = Primitive("named_product")
product_p.def_abstract_eval(lambda x, out, *, path: out)

_wanted: contextvars.ContextVar[bool] = contextvars.ContextVar("wanted", default=False)


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Products of compressed weights that are traced within the block are marked."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def mark(path: str, x: Any, out: Any) -> Any:
    """`out`, the product of `x` and the weight at `path`; marked if somebody asks."""
    return product_p.bind(x, out, path=path) if _wanted.get() else out
