"""The product with a block-sparse matrix: gather what its blocks need, multiply that."""

import math

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["block_sparse_dot"]


def block_sparse_dot(x: jax.Array, blocks: jax.Array, rows: jax.Array, columns: int) -> jax.Array:
    """`x[..., m, k] @ w[..., k, columns]`, summed in float32 or wider.

    `blocks[..., across, slots, height, width]` are the kept blocks of each column of
    blocks of `w`, `rows[..., across, slots]` the rows of blocks that they lie in. Leading
    dimensions are those of `x`.
    """
    if rows.ndim > 2:
        return jax.vmap(lambda x, b, r: block_sparse_dot(x, b, r, columns))(x, blocks, rows)
    across, slots, height, width = blocks.shape
    m, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, -k % height))).reshape(m, -1, height)
    # [across, m, slots * height]: what each column of blocks multiplies.
    seen = jnp.take(x, rows.reshape(-1), axis=1).reshape(m, across, slots * height)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights = blocks.reshape(across, slots * height, width).astype(x.dtype)
    out = lax.dot_general(seen, weights, (((2,), (1,)), ((1,), (0,))), preferred_element_type=wide)
    return out.transpose(1, 0, 2).reshape(m, math.prod((across, width)))[:, :columns]
