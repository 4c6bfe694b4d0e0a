"""The derivative of a call that brings its own, as a program."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn

from jaxcompress._program import step

__all__ = ["DERIVATIVES", "aval_of", "is_float"]


def aval_of(v: Any) -> jax.core.ShapedArray:
    """The shape and dtype of a variable or a literal."""
    return v.aval


def is_float(v: Any) -> bool:
    return jnp.issubdtype(aval_of(v).dtype, jnp.inexact)


def _split(eqn: JaxprEqn) -> tuple[list[jax.ShapeDtypeStruct], Any, Any]:
    """The inputs as shapes; the floating ones of a list; the call as a function of those."""
    shapes = [jax.ShapeDtypeStruct(aval_of(v).shape, aval_of(v).dtype) for v in eqn.invars]
    floats = [i for i, v in enumerate(eqn.invars) if is_float(v)]

    def pick(values: Any) -> list[Any]:
        return [values[i] for i in floats]

    def call(values: Any) -> Any:
        def of_floats(*some: Any) -> Any:
            whole = dict(enumerate(values)) | dict(zip(floats, some))
            return step(eqn)(*(whole[i] for i in range(len(values))))

        return of_floats

    return shapes, pick, call


def _forward(eqn: JaxprEqn) -> ClosedJaxpr:
    """`(inputs, tangents of the floating ones) -> tangents of the results`."""
    shapes, pick, call = _split(eqn)

    def jvp(values: Any, tangents: Any) -> Any:
        return jax.jvp(call(values), pick(values), tangents)[1]

    return jax.make_jaxpr(jvp)(shapes, pick(shapes))


def _backward(eqn: JaxprEqn) -> ClosedJaxpr:
    """`(inputs, cotangents of the results) -> cotangents of the floating inputs`."""
    shapes, pick, call = _split(eqn)
    results = [jax.ShapeDtypeStruct(aval_of(v).shape, aval_of(v).dtype) for v in eqn.outvars]

    def vjp(values: Any, cotangents: Any) -> Any:
        return jax.vjp(call(values), *pick(values))[1](cotangents)

    return jax.make_jaxpr(vjp)(shapes, results)


DERIVATIVES = {
    "custom_jvp_call": _forward,
    "custom_vjp_call": _backward,
}
