"""The product with a block-sparse matrix: what its blocks need, and nothing else."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.ops._choice import Choice, Implementation, Problem, choose, dispatch
from jaxcompress.ops._cpu import cpu_refuses

__all__ = ["block_sparse_dot", "plan"]


def block_sparse_dot(x: jax.Array, blocks: jax.Array, rows: jax.Array, columns: int) -> jax.Array:
    """`x[..., m, k] @ w[..., k, columns]`, summed in float32 or wider.

    `blocks[..., across, slots, height, width]` are the kept blocks of each column of
    blocks of `w`, `rows[..., across, slots]` the rows of blocks that they lie in. Leading
    dimensions are those of `x`.
    """
    lead = x.shape[:-2]
    flat = (a.reshape(math.prod(lead), *a.shape[len(lead) :]) for a in (x, blocks, rows))
    return _matmul(columns, *flat).reshape(*lead, x.shape[-2], columns)


def plan(m: int, k: int, n: int, width: int, dtype: str, platform: str) -> Choice:
    """The implementation that `block_sparse_dot` takes on `platform`."""
    return choose(_table(n, width), Problem(m=m, k=k, n=n, dtype=dtype), platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(columns, x, blocks, rows):
    problem = Problem(m=x.shape[-2], k=x.shape[-1], n=columns, dtype=x.dtype.name)
    return dispatch(_table(columns, blocks.shape[-1]), problem, None, x, blocks, rows)


def _forward(columns, *operands):
    return _matmul(columns, *operands), operands


def _backward(columns, operands, g):
    x, blocks, rows = operands

    def run(x: jax.Array, reals: jax.Array) -> jax.Array:
        return _gathered(columns, x, reals, rows)

    floats = jnp.issubdtype(blocks.dtype, jnp.floating)
    reals = blocks if floats else blocks.astype(jnp.float32)
    dx, dblocks = jax.vjp(run, x, reals)[1](g)
    return dx, dblocks if floats else None, None


_matmul.defvjp(_forward, _backward)


def _table(columns: int, width: int) -> tuple[Implementation, ...]:
    def refuses(problem: Problem, platform: str) -> str | None:
        if problem.dtype not in ("float32", "bfloat16", "float16"):
            return f"it sums in float32, too little for {problem.dtype}"
        if platform == "cpu" and width % 16:
            return f"its blocks are multiples of 16 wide, not {width}"
        return cpu_refuses(problem, platform)

    native = "native: multiplies the kept blocks where they lie"
    gathers = "the activations of kept blocks are gathered; a dense product of those"
    return (
        Implementation("cpu", native, functools.partial(_cpu, columns), refuses),
        Implementation("reference", gathers, functools.partial(_gathered, columns)),
    )


def _cpu(columns, x, blocks, rows):
    from jaxcompress.kernels.block_sparse_matmul import cpu as kernel

    return kernel.block_sparse_matmul(x, blocks, rows, columns, otherwise=_by_xla(columns))


@functools.cache
def _by_xla(columns: int) -> Callable[..., jax.Array]:
    """What an exported program does for the native call: one function for each number."""
    return functools.partial(_gathered, columns)


def _gathered(columns: int, x: jax.Array, blocks: jax.Array, rows: jax.Array) -> jax.Array:
    if rows.ndim > 2:
        return jax.vmap(functools.partial(_gathered, columns))(x, blocks, rows)
    across, slots, height, width = blocks.shape
    m, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, -k % height))).reshape(m, -1, height)
    # [across, m, slots * height]: what each column of blocks multiplies.
    seen = jnp.take(x, rows.reshape(-1), axis=1).reshape(m, across, slots * height)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights = blocks.reshape(across, slots * height, width).astype(x.dtype)
    out = lax.dot_general(seen, weights, (((2,), (1,)), ((1,), (0,))), preferred_element_type=wide)
    return out.transpose(1, 0, 2).reshape(m, math.prod((across, width)))[:, :columns]
