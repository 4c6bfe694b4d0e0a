"""A user's function as a program whose first inputs are its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr

from jaxcompress._paths import leaves_with_paths, rebuild
from jaxcompress._program import is_array

__all__ = ["Model", "arrays_of", "trace_model"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A function of arrays: first the parameters at `paths`, then the arguments."""

    jaxpr: ClosedJaxpr
    paths: list[str]
    tree: Any

    @property
    def consts(self) -> list[Any]:
        return self.jaxpr.consts

    def result(self, outs: list[Any]) -> Any:
        return jax.tree.unflatten(self.tree, outs)


def trace_model(fn: Callable[..., Any], params: Any, args: Any) -> Model:
    """`fn(params, *args)` traced; what of the arguments is no array is a part of it."""
    pairs = leaves_with_paths(params)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in pairs if hasattr(x, "dtype")]
    arrays, rest = eqx.partition(args, is_array)

    def call(leaves: list[Any], arrays: Any) -> Any:
        new = iter(leaves)
        whole = [next(new) if hasattr(x, "dtype") else x for _, x in pairs]
        return fn(rebuild(params, whole), *eqx.combine(arrays, rest))

    jaxpr, shape = jax.make_jaxpr(call, return_shape=True)(shapes, arrays)
    paths = [path for path, x in pairs if hasattr(x, "dtype")]
    return Model(jaxpr, paths, jax.tree.structure(shape))


def arrays_of(args: Any) -> list[Any]:
    """The arrays among the arguments, in the order of the program's inputs."""
    return [x for x in jax.tree.leaves(args) if is_array(x)]
