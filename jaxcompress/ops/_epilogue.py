"""What may follow a product: a bias, an activation, one more array."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

__all__ = ["ACTIVATIONS", "finish", "in_places", "said"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}


def finish(
    out: jax.Array, bias: jax.Array | None, activation: str | None, residual: jax.Array | None
) -> jax.Array:
    """`activation(out + bias) + residual` of `out[..., m, n]` and `bias[..., 1, n]`, in float32."""
    if bias is None and activation is None and residual is None:
        return out
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    if bias is not None:
        out = out + bias.astype(out.dtype)
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out if residual is None else out + residual.astype(out.dtype)


def in_places(there: Sequence[bool], arrays: Sequence[jax.Array]) -> list[jax.Array | None]:
    """The arrays of a call in their places, None where the call has none."""
    rest = iter(arrays)
    return [next(rest) if is_there else None for is_there in there]


def said(has_bias: bool, activation: str | None, has_residual: bool) -> str:
    """The same in words, for `explain`."""
    parts = [*["bias"] * has_bias, *filter(None, [activation]), *["the array added"] * has_residual]
    return f"{', '.join(parts)} inside"
