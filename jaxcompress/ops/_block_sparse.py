"""`block_sparse_matmul`: the product with what a block-sparse matrix keeps, and nothing else."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxcompress.ops._choice import Choice, Implementation, Problem, dispatch, explained
from jaxcompress.ops._cpu import cpu_refuses
from jaxcompress.ops._epilogue import finish, in_places
from jaxcompress.ops._kernels import (
    blocks_of,
    call_kernel,
    chip,
    kernel_module,
    no_pallas_tpu,
    no_triton,
    not_cut,
)

__all__ = ["block_sparse_matmul", "plan"]


@dataclasses.dataclass(frozen=True)
class _Static:
    columns: int
    height: int
    width: int
    weights: str
    dtype: str
    implementation: str | None
    activation: str | None = None


def block_sparse_matmul(
    x: jax.Array,
    blocks: jax.Array,
    rows: jax.Array,
    *,
    columns: int,
    counts: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies by a matrix of which only whole blocks are kept, summed in float32.

    `y[:, c] = sum_(s < counts[c]) x[:, rows[c, s]] @ blocks[c, s]`, for blocks of columns `c`

    Args:
      x: `[..., m, k]`, floats; an index of `rows` stands for `height` of its columns.
      blocks: floats or int8 codes, `[across, slots, height, width]`, or with the leading
        dimensions of `x`: what each of the `ceil(columns / width)` blocks of columns keeps.
      rows: int32 `[..., across, slots]`, the row of blocks that each lies in, below
        `ceil(k / height)`; within a column they differ.
      columns: `n`; a last block may reach beyond it, and beyond `k`, with zeros.
      counts: int32 `[..., across]`, how many slots are used; the blocks of the others are
        zeros. None for all.
      dtype: of the result; None for float32, or that of `x` where it is wider.
      implementation: "cpu" (the native kernels), "pallas_tpu" or "triton" (a block at a
        time, no more steps than there are blocks), "reference" (activations gathered), or
        None for the first that serves the shape on the platform.

    Returns:
      `[..., m, columns]`. Differentiable in `x`, and in `blocks` if they are floats; unused
      slots have the gradient zero.

    Raises:
      TypeError: an operand has a dtype that is not named above.
      ValueError: shapes do not match, or the implementation cannot run, with the reason.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> x, blocks = jnp.ones((2, 64)), jnp.ones((3, 1, 16, 16))
    >>> rows = jnp.array([[0], [3], [1]])
    >>> y = jc.ops.block_sparse_matmul(x, blocks, rows, columns=48)
    >>> y.shape, float(y[0, 0])
    ((2, 48), 16.0)

    Gray et al., 2017, GPU Kernels for Block-Sparse Weights; Gale et al., 2020, Sparse GPU
    Kernels for Deep Learning, arXiv:2006.10901 (long rows first).
    """
    return multiply_blocks(
        x, blocks, rows, columns=columns, counts=counts, dtype=dtype, implementation=implementation
    )


def multiply_blocks(
    x: jax.Array,
    blocks: jax.Array,
    rows: jax.Array,
    *,
    columns: int,
    counts: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`block_sparse_matmul`, and what follows: `activation(y + bias[..., 1, n]) + residual`."""
    _check(x, blocks, rows, columns, counts)
    lead, m = x.shape[:-2], x.shape[-2]
    batch = blocks.shape[:-4]
    b = math.prod(batch)
    flat = lambda a, core: None if a is None else a.reshape(b, *a.shape[a.ndim - core :])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    height, width = blocks.shape[-2:]
    static = _Static(
        columns,
        height,
        width,
        blocks.dtype.name,
        jnp.dtype(dtype or wide).name,
        implementation,
        activation,
    )
    by_rows = lambda a: a.reshape(b, math.prod(lead) * m // max(b, 1), a.shape[-1])
    residual = None if residual is None else by_rows(residual)
    weight = (flat(blocks, 4), flat(rows, 2), flat(counts, 1))
    out = _matmul(static, by_rows(x), *weight, flat(bias, 2), residual)
    return out.reshape(*lead, m, columns)


def _check(
    x: jax.Array, blocks: jax.Array, rows: jax.Array, columns: int, counts: jax.Array | None
) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"block_sparse_matmul takes float activations; x is {x.dtype}")
    if blocks.dtype != jnp.int8 and not jnp.issubdtype(blocks.dtype, jnp.floating):
        raise TypeError(f"block_sparse_matmul takes floats or int8; blocks is {blocks.dtype}")
    for name, a in (("rows", rows), ("counts", counts)):
        if a is not None and a.dtype != jnp.int32:
            raise TypeError(f"block_sparse_matmul takes int32 {name}; got {a.dtype}")
    got = f"x{x.shape}, blocks{blocks.shape}, rows{rows.shape}"
    if x.ndim < 2 or blocks.ndim < 4 or blocks.shape[:-2] != rows.shape:
        raise ValueError(
            "expected x[..., m, k], blocks[..., across, slots, height, width] and "
            f"rows[..., across, slots]; got {got}"
        )
    if blocks.ndim > 4 and blocks.shape[:-4] != x.shape[:-2]:
        raise ValueError(f"expected blocks with the leading dimensions of x, or none; got {got}")
    width, across = blocks.shape[-1], rows.shape[-2]
    if across != -(-columns // max(width, 1)):
        raise ValueError(f"{columns} columns are not {across} blocks of {width}; got {got}")
    if counts is not None and counts.shape != rows.shape[:-1]:
        raise ValueError(f"expected counts of the shape {rows.shape[:-1]}; got {counts.shape}")


def plan(
    m: int, k: int, n: int, block: tuple[int, int], weights: str, dtype: str, platform: str
) -> Choice:
    """The implementation that `block_sparse_matmul` takes on `platform`."""
    static = _Static(n, *block, weights, dtype, None)
    return explained(_table(static), Problem(m=m, k=k, n=n, dtype=dtype), platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, blocks, rows, counts, bias, residual):
    operands = (x, blocks, rows, counts, bias, residual)
    return _run(_table(static), static, static.implementation, *operands)


def _run(table, static, implementation, x, *operands):
    problem = Problem(m=x.shape[-2], k=x.shape[-1], n=static.columns, dtype=x.dtype.name)
    return dispatch(table, problem, implementation, x, *operands)


def _forward(static, *operands):
    return _matmul(static, *operands), operands


def _backward(static, operands, g):
    """Two products over the same blocks, by kernels wherever the product itself is by one."""
    *operands, bias, residual = operands
    _, blocks, rows, counts = operands
    named = static.implementation if static.implementation != "cpu" else None
    dmore = (None, None)
    if bias is not None or residual is not None or static.activation is not None:
        plain = dataclasses.replace(static, activation=None)
        out = _matmul(plain, *operands, None, None)
        run = lambda *given: finish(given[0], given[1], static.activation, given[2])
        g, *dmore = jax.vjp(run, out, bias, residual)[1](g.astype(jnp.float32))
    dx = _run(_dx_table(static), static, named, *operands, g)
    if not jnp.issubdtype(blocks.dtype, jnp.floating):
        return dx, None, None, None, *dmore
    dblocks = _run(_dblocks_table(static), static, named, *operands, g)
    if counts is not None:
        used = jnp.arange(rows.shape[-1]) < counts[..., None]
        dblocks = jnp.where(used[..., None, None], dblocks, 0)
    return dx, dblocks, None, None, *dmore


_matmul.defvjp(_forward, _backward)


def _table(static: _Static) -> tuple[Implementation, ...]:
    does = "activations of kept blocks are gathered; a dense product of those"
    native = "native: multiplies the kept blocks where they lie"
    return (
        Implementation("cpu", native, functools.partial(_cpu, static), _cpu_refuses(static)),
        *_kernels(static, "one kept block after another", _finished(_by_kernel)),
        Implementation("reference", does, functools.partial(_finished(_gathered), static)),
    )


def _finished(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A product, and what follows it, step by step."""

    def steps(static, *given):
        *operands, bias, residual = given
        if bias is None and residual is None and static.activation is None:
            return run(static, *operands)
        out = run(dataclasses.replace(static, dtype="float32"), *operands)
        return finish(out, bias, static.activation, residual).astype(static.dtype)

    return steps


def _dx_table(static: _Static) -> tuple[Implementation, ...]:
    reference = Implementation("reference", "scattered", functools.partial(_gathered_dx, static))
    return (*_kernels(static, "blocks turned", _dx_by_kernel), reference)


def _dblocks_table(static: _Static) -> tuple[Implementation, ...]:
    reference = Implementation(
        "reference", "gathered activations", functools.partial(_gathered_dblocks, static)
    )
    return (*_kernels(static, "the sampled product", _dblocks_by_kernel), reference)


def _kernels(
    static: _Static, does: str, run: Callable[..., jax.Array]
) -> tuple[Implementation, ...]:
    """The two kernels for devices of one product."""
    op, floats = "block_sparse_matmul", ("float32", "bfloat16")

    def tpu_refuses(problem: Problem, platform: str) -> str | None:
        return no_pallas_tpu(platform) or _sides(static, 128) or _kinds(static, problem, floats)

    def gpu_refuses(problem: Problem, platform: str) -> str | None:
        kinds = (*floats, "float16")
        return no_triton(platform) or _sides(static, 16) or _kinds(static, problem, kinds)

    return (
        Implementation(
            "pallas_tpu",
            does,
            functools.partial(run, static, "tpu"),
            tpu_refuses,
            lambda problem, platform: not_cut(platform),
            blocks_of(op, "pallas_tpu", lambda p: (p.m, jnp.dtype(p.dtype).itemsize)),
        ),
        Implementation(
            "triton",
            does,
            functools.partial(run, static, "gpu"),
            gpu_refuses,
            blocks=blocks_of(op, "triton", lambda p: (p.m, static.width, static.height)),
        ),
    )


def _sides(static: _Static, unit: int) -> str | None:
    if static.height % unit or static.width % unit:
        return f"its blocks are of multiples of {unit}, not {static.height}x{static.width}"
    return None


def _kinds(static: _Static, problem: Problem, kinds: tuple[str, ...]) -> str | None:
    for kind, taken in ((problem.dtype, kinds), (static.weights, (*kinds, "int8"))):
        if kind not in taken:
            return f"it takes {', '.join(taken)}, not {kind}"
    return None


def _cpu_refuses(static: _Static) -> Callable[[Problem, str], str | None]:
    def refuses(problem: Problem, platform: str) -> str | None:
        if problem.dtype not in ("float32", "bfloat16", "float16"):
            return f"it sums in float32, too little for {problem.dtype}"
        if platform == "cpu" and static.width % 16:
            return f"its blocks are multiples of 16 wide, not {static.width}"
        return cpu_refuses(problem, platform)

    return refuses


def _by_kernel(static, where, x, blocks, rows, counts):
    across = rows.shape[1]
    lists = _as_they_lie(rows, counts) if where == "gpu" else _lists(rows, counts, across, False)
    return _product(static, where, x, blocks, lists, across, False)[..., : static.columns]


def _dx_by_kernel(static, where, x, blocks, rows, counts, g):
    k = x.shape[-1]
    down = -(-k // static.height)
    lists = _lists(rows, counts, down, turned=True)
    static = dataclasses.replace(static, dtype=x.dtype.name)
    return _product(static, where, g.astype(x.dtype), blocks, lists, down, True)[..., :k]


def _product(static, where, x, blocks, lists, count, transpose_w):
    run = functools.partial(
        _module(where).block_sparse_matmul,
        height=static.height,
        count=count,
        transpose_w=transpose_w,
        dtype=static.dtype,
        chip=_chip(where),
    )
    w = blocks.reshape(blocks.shape[0], -1, static.width)
    letters = ("bmk", "bpq", *["b1e"] * 3, *["b1c"] * 2)
    return call_kernel(run, letters, x, w, *lists, is_cut=where == "gpu")


def _dblocks_by_kernel(static, where, x, blocks, rows, counts, g):
    b, across, slots = rows.shape
    columns = jnp.broadcast_to(jnp.arange(across, dtype=jnp.int32)[:, None], rows.shape)
    lines = jnp.where(_used(rows, counts), columns, -1)
    run = functools.partial(
        _module(where).sampled_matmul, height=static.height, width=static.width, chip=_chip(where)
    )
    flat = lambda a: a.reshape(b, 1, across * slots)
    operands = x, g.astype(x.dtype), flat(lines), flat(rows)
    letters = ("bmk", "bmn", "b1e", "b1e")
    out = call_kernel(run, letters, *operands, is_cut=where == "gpu", result="bpq")
    return out.reshape(blocks.shape).astype(blocks.dtype)


def _module(where: str) -> Any:
    return kernel_module("block_sparse_matmul", "pallas_tpu" if where == "tpu" else "triton")


def _chip(where: str) -> str | None:
    return chip("tpu") if where == "tpu" else chip("cuda") or chip("rocm")


def _as_they_lie(rows: jax.Array, counts: jax.Array | None) -> tuple[jax.Array, ...]:
    """`_lists` of columns without sorting, and where in them each line starts and ends.

    The blocks of a column lie next to each other, those that it does not use at its end.
    """
    b, across, slots = rows.shape
    every = jnp.arange(across * slots, dtype=jnp.int32).reshape(1, 1, across, slots)
    every = jnp.broadcast_to(every, (b, 1, across, slots))
    starts = every[..., 0]
    ends = starts + (slots if counts is None else counts[:, None])
    flat = lambda a: a.reshape(b, 1, across * slots)
    return flat(every // slots), flat(rows), flat(every), starts, ends


def _used(rows: jax.Array, counts: jax.Array | None) -> jax.Array:
    if counts is None:
        return jnp.ones(rows.shape, bool)
    return jnp.arange(rows.shape[-1]) < counts[..., None]


def _lists(
    rows: jax.Array, counts: jax.Array | None, count: int, turned: bool
) -> tuple[jax.Array, ...]:
    """The line, the piece of the dense operand and the place of each block, by lines.

    A line is a block of columns of the weight, or with `turned` one of its rows; what is
    not used is in the line `count`.
    """
    b, across, slots = rows.shape
    columns = jnp.broadcast_to(jnp.arange(across, dtype=jnp.int32)[:, None], rows.shape)
    lines, sources = (rows, columns) if turned else (columns, rows)
    lines = jnp.where(_used(rows, counts), lines, count)
    flat = lambda a: a.reshape(b, 1, across * slots)
    lines, sources = flat(lines), flat(sources)
    places = jnp.argsort(lines, axis=-1, stable=True).astype(jnp.int32)
    sort = lambda a: jnp.take_along_axis(a, places, -1)
    return sort(lines), sort(sources), places


def _cpu(static, x, blocks, rows, counts, bias, residual):
    from jaxcompress.kernels.block_sparse_matmul import cpu as kernel

    out = kernel.block_sparse_matmul(
        x,
        blocks,
        rows,
        counts,
        static.columns,
        bias,
        residual,
        activation=static.activation,
        otherwise=_by_xla(static, *(a is not None for a in (counts, bias, residual))),
    )
    return out.astype(static.dtype)


@functools.cache
def _by_xla(static: _Static, *has: bool) -> Callable[..., jax.Array]:
    """What an exported program does for the native call: one function for each number."""
    static = dataclasses.replace(static, dtype="float32")

    def run(x, blocks, rows, *more):
        return _finished(_gathered)(static, x, blocks, rows, *in_places(has, more))

    return run


def _gathered(static, x, blocks, rows, counts):
    if rows.ndim > 2:
        return jax.vmap(functools.partial(_gathered, static))(x, blocks, rows, counts)
    across, slots, height, width = blocks.shape
    m, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, -k % height))).reshape(m, -1, height)
    # [across, m, slots * height]: what each column of blocks multiplies.
    seen = jnp.take(x, rows.reshape(-1), axis=1).reshape(m, across, slots * height)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights = blocks.reshape(across, slots * height, width).astype(x.dtype)
    out = lax.dot_general(seen, weights, (((2,), (1,)), ((1,), (0,))), preferred_element_type=wide)
    out = out.transpose(1, 0, 2).reshape(m, math.prod((across, width)))[:, : static.columns]
    return out.astype(static.dtype)


def _gathered_dx(static, x, blocks, rows, counts, g):
    run = lambda x: _gathered(static, x, blocks, rows, counts)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # in which pieces are added up
    return jax.vjp(run, wide)[1](g)[0].astype(x.dtype)


def _gathered_dblocks(static, x, blocks, rows, counts, g):
    run = lambda blocks: _gathered(static, x, blocks, rows, counts)
    return jax.vjp(run, blocks)[1](g)[0]
