"""`scaled_matmul`: the product of floats of four or eight bits with scales, block by block."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxcompress.ops._choice import Choice, Implementation, Problem, dispatch, explained
from jaxcompress.ops._int8_matmul import scaled_sums
from jaxcompress.ops._kernels import chip
from jaxcompress.ops._operands import check_scales, matmul_shape, one_batch
from jaxcompress.ops._quantized_matmul import float_dot

__all__ = ["plan", "scaled_matmul"]

_FLOATS = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
_SCALES = ("float32", "float8_e8m0fnu", "float8_e4m3fn")
# Chips whose matrix unit multiplies floats of eight bits, in these formats; and those that
# take a scale for each block as well: NVIDIA's and AMD's data sheets.
_EIGHT_BITS = {"cuda": ("8.9", "9.0", "10.0", "12.0"), "rocm": ("gfx950",), "tpu": ("TPU7x",)}
_BLOCKS = {"cuda": ("10.0", "12.0"), "rocm": ("gfx950",)}
# What those take: the bits of a number, the format of a scale, how many share it. They are
# mxfp8, mxfp4 and nvfp4.
_FORMATS = {(8, "float8_e8m0fnu", 32), (4, "float8_e8m0fnu", 32), (4, "float8_e4m3fn", 16)}


@dataclasses.dataclass(frozen=True)
class _Static:
    weights: str
    scales: str | None  # of both sides, None where they differ
    group_size: int | None
    transpose_w: bool
    dtype: str
    implementation: str | None


def scaled_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    x_scale: jax.Array,
    w_scale: jax.Array,
    group_size: int | None = None,
    transpose_w: bool = False,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies floats of four or eight bits, each row and column scaled whole or in groups.

    `y[m, n] = sum_g s_x[m, g] s_w[g, n] sum_(k in g) x[m, k] w[k, n]`

    Args:
      x: float8_e4m3fn, float8_e5m2 or float4_e2m1fn `[..., m, k]`.
      w: of these `[k, n]`, or with the leading dimensions of `x`; with `transpose_w`,
        `[n, k]`.
      x_scale: `[..., m, g]`, float32, float8_e8m0fnu (a power of two) or float8_e4m3fn; `g`
        is 1, or with `group_size` the number of groups.
      w_scale: `[..., g, n]` of these dtypes, the leading dimensions those of `w`.
      group_size: the neighbouring `k` that share a scale, on both sides: 32 in mxfp8 and
        mxfp4, 16 in nvfp4. None for one scale a row and a column.
      transpose_w: whether `w` comes as `[n, k]`; `w_scale` is `[..., g, n]` all the same.
      dtype: of the result.
      implementation: "xla" (floats of eight bits go to XLA as they are, scales follow),
        "scaled_dot" (`jax.nn.scaled_matmul`: mxfp8, mxfp4 and nvfp4, on GPUs), "reference"
        (decoded to float32), or None for the first that the chip at hand has a unit for.

    Returns:
      `[..., m, n]` of `dtype`. Differentiable in scales of float32.

    Raises:
      TypeError: an operand has a dtype that is not named above.
      ValueError: shapes do not match, or the implementation that is named does not take them,
        with the reason.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> x, w = jnp.full((2, 64), 6, "float4_e2m1fn"), jnp.full((64, 3), 1.5, "float4_e2m1fn")
    >>> two, half = jnp.full((2, 2), 2, "float8_e8m0fnu"), jnp.full((2, 3), 0.5, "float8_e8m0fnu")
    >>> y = jc.ops.scaled_matmul(x, w, x_scale=two, w_scale=half, group_size=32)
    >>> y.shape, float(y[0, 0])
    ((2, 3), 576.0)

    Micikevicius et al., 2022, FP8 Formats for Deep Learning, arXiv:2209.05433; Rouhani et
    al., 2023, Microscaling Data Formats for Deep Learning, arXiv:2310.10537.
    """
    for name, operand, kinds in (
        ("x", x, _FLOATS),
        ("w", w, _FLOATS),
        ("x_scale", x_scale, _SCALES),
        ("w_scale", w_scale, _SCALES),
    ):
        if operand.dtype.name not in kinds:
            raise TypeError(
                f"scaled_matmul takes {name} of {', '.join(kinds)}; it is {operand.dtype}"
            )
    lead, m, k, n = matmul_shape(x.shape, w.shape, transpose_w)
    groups = check_scales({"w_scale": w_scale}, w.shape[:-2], k, n, group_size)
    check_scales({"x_scale": x_scale}, lead, k, m, group_size, transpose=True)
    x_scale = jnp.broadcast_to(x_scale, (*lead, m, groups))
    if w.ndim == 2:  # one product of all rows
        rows = math.prod(lead) * m
        x, x_scale = x.reshape(1, rows, k), x_scale.reshape(1, rows, groups)
        w, w_scale = w[None], w_scale[None]
    else:
        x, w, x_scale, w_scale = map(one_batch, (x, w, x_scale, w_scale))
    w_scale = jnp.broadcast_to(w_scale, (*w_scale.shape[:1], groups, n))
    static = _Static(
        w.dtype.name,
        x_scale.dtype.name if x_scale.dtype == w_scale.dtype else None,
        group_size if groups > 1 else None,
        transpose_w,
        jnp.dtype(dtype).name,
        implementation,
    )
    return _matmul(static, x, w, x_scale, w_scale).reshape(*lead, m, n)


def plan(
    m: int,
    k: int,
    n: int,
    x: str,
    w: str,
    group_size: int | None,
    transpose_w: bool,
    platform: str,
) -> Choice:
    """The implementation that `scaled_matmul` takes on `platform`: in groups, of mxfp8."""
    scales = "float32" if group_size is None else "float8_e8m0fnu"
    group = group_size if group_size is not None and group_size < k else None
    static = _Static(w, scales, group, transpose_w, "float32", None)
    problem = Problem(m=m, k=k, n=n, group_size=group, dtype=x)
    return explained(_table(static), problem, platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, w, x_scale, w_scale):
    n = w.shape[-2] if static.transpose_w else w.shape[-1]
    problem = Problem(
        m=x.shape[-2], k=x.shape[-1], n=n, group_size=static.group_size, dtype=x.dtype.name
    )
    return dispatch(_table(static), problem, static.implementation, x, w, x_scale, w_scale)


def _forward(static, *operands):
    return _matmul(static, *operands), operands


def _backward(static, operands, g):
    x, w, *scales = operands
    run = lambda *scales: _reference(static, x, w, *scales)
    found = jax.vjp(run, *scales)[1](g)
    floats = (d if s.dtype == jnp.float32 else None for s, d in zip(scales, found))
    return None, None, *floats


_matmul.defvjp(_forward, _backward)


def _reference(static, x, w, x_scale, w_scale):
    x, w, x_scale, w_scale = (a.astype(jnp.float32) for a in (x, w, x_scale, w_scale))
    if static.group_size is None:
        return _whole(static, float_dot, x, w, x_scale, w_scale)
    along = -1 if static.transpose_w else -2
    scale = jnp.swapaxes(w_scale, -1, -2) if static.transpose_w else w_scale
    spread = lambda a, axis: jnp.repeat(a, static.group_size, axis)
    x = x * spread(x_scale, -1)[..., : x.shape[-1]]
    cut = spread(scale, along)[:, : w.shape[-2], : w.shape[-1]]
    return float_dot(x, w * cut, static.transpose_w).astype(static.dtype)


def _whole(static, dot, x, w, x_scale, w_scale):
    """Any product of numbers, then its scales."""
    sums = scaled_sums(dot, x, w, x_scale, w_scale, None, None, static.transpose_w)
    return sums.astype(static.dtype)


def _xla(static, x, w, x_scale, w_scale):
    return _whole(static, _dot, x, w, x_scale, w_scale)


def _dot(x: jax.Array, w: jax.Array, transpose_w: bool) -> jax.Array:
    """`x[b, m, k] @ w[b, k, n]` of the numbers as they are, summed in float32."""
    numbers = (((2,), (2 if transpose_w else 1,)), ((0,), (0,)))
    return lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32)


def _scaled_dot(static, x, w, x_scale, w_scale):
    w = w if static.transpose_w else jnp.swapaxes(w, -1, -2)
    columns = jnp.swapaxes(w_scale, -1, -2)
    out = jax.nn.scaled_matmul(x, w, x_scale, columns, preferred_element_type=jnp.float32)
    return out.astype(static.dtype)


def _table(static: _Static) -> tuple[Implementation, ...]:
    def bound(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return functools.partial(run, static)

    def xla_refuses(problem: Problem, platform: str) -> str | None:
        if static.group_size is not None:
            return f"it scales whole rows and columns, not groups of {static.group_size}"
        if "float4_e2m1fn" in (static.weights, problem.dtype):
            return "it takes floats of eight bits, not float4_e2m1fn"
        return _no_chip(_EIGHT_BITS, "floats of eight bits", platform)

    def scaled_refuses(problem: Problem, platform: str) -> str | None:
        if static.group_size is None:
            return "it takes a scale for each group"
        bits = {int(name[5]) for name in (static.weights, problem.dtype)}
        if (*bits, static.scales, static.group_size) not in _FORMATS:
            return (
                "it takes mxfp8, mxfp4 and nvfp4, not "
                f"{problem.dtype} times {static.weights} by {static.group_size}, with scales "
                f"of {static.scales or 'two dtypes'}"
            )
        if problem.k % static.group_size:
            return f"its groups are whole, and {problem.k} are not by {static.group_size}"
        return _no_chip(_BLOCKS, "scaled blocks", platform)

    eight, blocks = "a product of eight-bit floats by XLA", "a product of scaled blocks by XLA"
    no_unit = functools.partial(_no_unit, _EIGHT_BITS, "floats of eight bits")
    no_blocks = functools.partial(_no_unit, _BLOCKS, "scaled blocks")
    return (
        Implementation("xla", eight, bound(_xla), xla_refuses, no_unit),
        Implementation("scaled_dot", blocks, bound(_scaled_dot), scaled_refuses, no_blocks),
        Implementation("reference", "a float product of the decoded numbers", bound(_reference)),
    )


def _no_unit(
    chips: dict[str, tuple[str, ...]], what: str, problem: Problem, platform: str
) -> str | None:
    """Why the chip at hand should not: elsewhere XLA makes wider floats of them first."""
    here = chip(platform)
    if here in chips[platform]:
        return None
    names = ", ".join(chips[platform])
    return f"{what} are for {names}; {here or 'no such chip'} is at hand"


def _no_chip(chips: dict[str, tuple[str, ...]], what: str, platform: str) -> str | None:
    return None if platform in chips else f"{platform} has no unit for {what}"
