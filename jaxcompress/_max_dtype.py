"""A float32 whose cotangents add up by their maximum.

A weight that is used several times gets the sum of the cotangents of its uses. That is
right for counts and second moments; the largest activation of all uses is not a sum.
JAX lets an extended dtype say what adding two of its cotangents means, and asks it also
in the transpose of a scan; this one takes the larger.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import core, dtypes

__all__ = ["from_max", "to_max"]


class _Rules:
    """What JAX asks of an extended dtype."""

    @staticmethod
    def physical_element_aval(dtype: Any) -> core.ShapedArray:
        return core.ShapedArray((), jnp.dtype("float32"))

    @staticmethod
    def convert_from(dtype: Any, other: Any) -> bool:
        return other == jnp.dtype("float32")

    @staticmethod
    def convert_to(other: Any, dtype: Any) -> bool:
        return other == jnp.dtype("float32")

    @staticmethod
    def add(dtype: Any, x: Any, y: Any) -> Any:
        return to_max(lax.max(from_max(x), from_max(y)))

    @staticmethod
    def zero(dtype: Any) -> Any:
        return to_max(jnp.float32(0))

    @staticmethod
    def full(shape: Any, fill_value: Any, dtype: Any) -> Any:
        return to_max(lax.full(shape, from_max(fill_value), jnp.float32))

    @staticmethod
    def tangent_dtype(dtype: Any) -> Any:
        return dtype


class _MaxKind(dtypes.extended):
    pass


@dataclasses.dataclass(frozen=True)
class _MaxDType(dtypes.ExtendedDType):
    _rules: type = _Rules
    type: type = _MaxKind

    @property
    def name(self) -> str:
        return "max32"

    def __repr__(self) -> str:
        return self.name


_MAX32 = _MaxDType()


def to_max(x: jax.Array) -> jax.Array:
    """Float32 magnitudes as an array whose cotangents add up by their maximum."""
    return lax.convert_element_type(x, _MAX32)


def from_max(x: jax.Array) -> jax.Array:
    """Back to float32."""
    return lax.convert_element_type(x, jnp.float32)
