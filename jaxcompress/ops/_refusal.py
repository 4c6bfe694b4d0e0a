"""The branch of a program that no compiler gets past: it raises our reason.

A program is traced once, and which platform it is compiled for is known later. So a reason
not to run there is a primitive, an identity, that raises where it is lowered.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

__all__ = ["refused"]


def refused(run: Callable[..., Any], reasons: dict[str, str], elsewhere: str) -> Callable[..., Any]:
    """`run`, which raises a `ValueError` where it is compiled for a platform that has a reason.

    `elsewhere` is the reason of a platform that JAX has and the library does not know.
    """
    stop = functools.partial(_refused_p.bind, reasons=(*reasons.items(),), elsewhere=elsewhere)
    # Around what goes in: lowered before anything that the platform cannot lower.
    return lambda *args: run(*jax.tree.map(stop, args))


_refused_p = Primitive("refused")
_refused_p.def_abstract_eval(lambda x, **words: x)
batching.defvectorized(_refused_p)


@_refused_p.def_impl
def _impl(x, **words):
    """Lowers for the platform at hand, which raises."""
    jax.jit(functools.partial(_refused_p.bind, **words)).lower(x)


def _lower(ctx, x, *, reasons, elsewhere):
    platforms = ctx.platforms or ctx.module_context.platforms
    why = [dict(reasons)[p] for p in platforms if p in dict(reasons)]
    raise ValueError(why[0] if why else elsewhere)


mlir.register_lowering(_refused_p, _lower)
