"""What the products of codes take: shapes, scales, and how many products a sum may have."""

import math

import jax
import jax.numpy as jnp

__all__ = [
    "MAX_K",
    "MAX_K_ZERO_POINT",
    "check_scales",
    "check_sums",
    "matmul_shape",
    "one_batch",
    "row_scales",
    "spread",
]

# The longest sum of products of two bytes that an int32 can hold: 2^31 / 128^2, less one.
# With a zero point the weight's side of a product is as large as 255: 2^31 / (128 255).
MAX_K = 131_071
MAX_K_ZERO_POINT = 65_793


def matmul_shape(
    x: tuple[int, ...], w: tuple[int, ...], transpose_w: bool
) -> tuple[tuple[int, ...], int, int, int]:
    """`(leading dimensions, m, k, n)` of a product, or a `ValueError`."""
    if len(x) < 2 or len(w) < 2:
        raise ValueError(f"expected x[..., m, k] and w[k, n]; got shapes {x} and {w}")
    k, n = (w[-1], w[-2]) if transpose_w else (w[-2], w[-1])
    if x[-1] != k or (len(w) > 2 and w[:-2] != x[:-2]):
        order = "[..., n, k]" if transpose_w else "[..., k, n]"
        raise ValueError(f"expected x[..., m, k] and w{order}; got shapes {x} and {w}")
    return x[:-2], x[-2], k, n


def check_scales(
    scales: dict[str, jax.Array | None],
    lead: tuple[int, ...],
    k: int,
    n: int,
    group_size: int | None,
    transpose: bool = False,
) -> int:
    """The number of groups; raises unless all scales are `[*lead, g, n]`, or 1 in place of each."""
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be positive; got {group_size}")
    groups = 1 if group_size is None or group_size >= k else -(-k // group_size)
    expected = (*lead, n, groups) if transpose else (*lead, groups, n)
    for name, scale in scales.items():
        if scale is None:
            continue
        fits = len(scale.shape) == len(expected)
        if not fits or any(s not in (1, e) for s, e in zip(scale.shape, expected)):
            raise ValueError(
                f"expected {name} of the shape {expected}, with 1 for what is shared; "
                f"got {scale.shape}"
            )
    return groups


def check_sums(longest: int, has_zero: bool) -> None:
    """Raises if a sum of so many products may leave int32."""
    limit = MAX_K_ZERO_POINT if has_zero else MAX_K
    if longest > limit:
        raise ValueError(f"int32 holds the sum of at most {limit} products of int8; got {longest}")


def row_scales(name: str, scale: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """A scale for each row, `[..., m, 1]`; raises unless it is of floats that broadcast to it."""
    if scale is None:
        return None
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"{name} is of floats; got {scale.dtype}")
    fits = scale.ndim <= len(shape)
    if not fits or any(s not in (1, e) for s, e in zip(scale.shape[::-1], shape[::-1])):
        raise ValueError(f"expected {name} that broadcasts to {shape}; got {scale.shape}")
    return jnp.broadcast_to(scale, shape)


def one_batch(a: jax.Array) -> jax.Array:
    """`[..., r, c]` as `[b, r, c]`, also where one of them is 0."""
    return a.reshape(math.prod(a.shape[:-2]), *a.shape[-2:])


def spread(a: jax.Array | None, *shape: int) -> jax.Array | None:
    """`one_batch` of `a` broadcast to the shape; None of None."""
    return None if a is None else one_batch(jnp.broadcast_to(a, shape))
