"""The product of dense activations and a `QuantizedArray`, in canonical form.

`plan` decides, from shapes and formats alone, which op takes the product; `linear`
does it. Whole-float codes (a training step) go through the same formulas in floats, so
that training sees what inference will do; integer codes go to `jc.ops`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays._formats import FloatType
from jaxcompress.arrays._prepacked import PrepackedArray
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import QuantizedArray
from jaxcompress.ops import _int8_matmul, _quantized_matmul, _scaled_matmul, _w4a8_matmul
from jaxcompress.ops._activations import BLOCK, encode_activations, encode_blocks, in_blocks
from jaxcompress.ops._choice import Choice, Implementation, Problem, dispatch, explained
from jaxcompress.ops._cpu import cpu_refuses, needs_packing
from jaxcompress.ops._epilogue import finish, in_places
from jaxcompress.ops._gradients import quantized_gradient_dot
from jaxcompress.ops._int8_matmul import int8_matmul, scaled_sums
from jaxcompress.ops._operands import check_sums
from jaxcompress.ops._quantized_matmul import (
    batched,
    decode,
    float_dot,
    multiply_stored,
    scaled_dot,
)
from jaxcompress.ops._scaled_matmul import scaled_matmul
from jaxcompress.ops._w4a8_matmul import w4a8_matmul

__all__ = ["Linear", "int_linear", "linear", "over_rows", "plan"]

Weight = QuantizedArray | PrepackedArray


def linear(
    x: jax.Array,
    w: Weight,
    transpose_w: bool,
    dtype: Any,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`x[..., m, k] @ w[..., k, n]` (`[..., n, k]` with `transpose_w`), as `dtype`.

    The scales of `w` are shared along `n` never, along `k` always or by groups; leading
    dimensions of both are the same. What follows is `activation(y + bias[..., 1, n]) + residual`.
    """
    panels = w.n if isinstance(w, PrepackedArray) else None
    group = _group_size(w, transpose_w)
    static = Linear(w.act, group, transpose_w, _bits(w), panels, activation)
    offset = None if isinstance(w, PrepackedArray) else w.act_offset
    scales = (w.scale, w.zero_point, w.act_scale, offset)
    if isinstance(w, PrepackedArray) or isinstance(w.qtype, IntType):
        values = w.values
    else:
        values = w.numbers()
    kinds = _float8(w)
    if kinds is not None:
        out = _float8_linear(static, kinds, x, w.values, *scales)
        return finish(out, bias, activation, residual).astype(dtype)
    if _floats(w) is not None:
        out = _simulate(static, x, values, *scales)
        return finish(out, bias, activation, residual).astype(dtype)
    if w.act is not None:
        return int_linear(static, x, values, *scales, bias, residual).astype(dtype)
    return multiply_stored(
        x,
        values,
        w.scale,
        w.zero_point,
        bias,
        residual,
        panels=panels,
        bits=_bits(w),
        group_size=group,
        transpose_w=transpose_w,
        dtype=dtype,
        activation=activation,
    )


def plan(
    w: Weight, transpose_w: bool, m: int, k: int, n: int, dtype: str, platform: str
) -> tuple[str, Choice]:
    """The op that `linear` calls, and its implementation on `platform`."""
    floats, kinds = _floats(w), _float8(w)
    if kinds is not None:
        group = BLOCK if w.group_size else None
        return "scaled_matmul", _scaled_matmul.plan(m, k, n, *kinds, group, transpose_w, platform)
    if floats is not None:
        how = Implementation("reference", floats[1], _simulate)
        return floats[0], Choice(how, how.does)
    if isinstance(w, PrepackedArray):
        group = w.group_size
    else:
        group = max(w.group_size) if w.group_size else None
    problem = Problem(
        m=m,
        k=k,
        n=n,
        bits=_bits(w),
        group_size=group,
        dtype=dtype,
        packed=_bits(w) < 8 and w.values.dtype == jnp.uint8,
        transpose_w=transpose_w,
    )
    op, table = "quantized_matmul", _quantized_matmul.table()
    if w.act is not None:
        op, table = "int8_matmul", _int8_matmul.table()
        if _is_w4a8(_bits(w), w.values, transpose_w):
            op, table = "w4a8_matmul", _w4a8_matmul.table()
        native, _ = _table(Linear(w.act, group, transpose_w, _bits(w)))
        if native.refuses(problem, platform) is None:
            table = (native,)
    choice = explained(table, problem, platform)
    if isinstance(w, PrepackedArray):
        if choice.implementation.name != "cpu":
            choice = choice._replace(why=f"{choice.why}; put back from the CPU kernels' order")
    elif choice.implementation.name == "cpu":
        choice = choice._replace(why=needs_packing(choice.why))
    return op, choice


def _bits(w: Weight) -> int:
    """Of a code that `quantized_matmul` gets: other numbers than integers come decoded."""
    return w.qtype.bits if isinstance(w.qtype, IntType) else 8


def _is_w4a8(bits: int, values: jax.Array, transpose_w: bool) -> bool:
    """Whether there is an op for the weight as it is stored: bit planes along the rows."""
    return bits == 4 and values.dtype == jnp.uint8 and values.ndim <= 3 and not transpose_w


def _floats(w: Weight) -> tuple[str, str] | None:
    """The op and the reason where a product runs on floats, None where on integers."""
    if jnp.issubdtype(w.values.dtype, jnp.floating):
        return "simulated", "rounded floats, with gradients"
    if not w.qtype.integer:
        return "quantized_matmul", f"a float product of the decoded {w.qtype.name}"
    if w.act is not None and not w.act.qtype.integer:
        return "quantized_matmul", f"a float product of {w.act.qtype.name} activations"
    return None


# Eight-bit floats that JAX has too: the codes of a weight are their bits.
_FLOAT8 = {FloatType(4, 3, 448.0): "float8_e4m3fn", FloatType(5, 2, 57344.0): "float8_e5m2"}
_MXFP8 = FloatType(4, 3, 448.0, scales="e8m0")


def _float8(w: Weight) -> tuple[str, str] | None:
    """The dtypes of activations and weight where both are stored as eight-bit floats."""
    if w.act is None or w.values.dtype != jnp.int8:
        return None
    if w.qtype == w.act.qtype == _MXFP8 and w.group_size and max(w.group_size) == BLOCK:
        return "float8_e4m3fn", "float8_e4m3fn"
    if w.group_size is not None or w.act.qtype not in _FLOAT8 or w.qtype not in _FLOAT8:
        return None
    return _FLOAT8[w.act.qtype], _FLOAT8[w.qtype]


@dataclasses.dataclass(frozen=True)
class Linear:
    act: Activation | None
    group_size: int | None
    transpose_w: bool
    bits: int
    panels: int | None = None
    activation: str | None = None


def _group_size(w: Weight, transpose_w: bool) -> int | None:
    if isinstance(w, PrepackedArray):
        size = w.group_size
        return None if size is None or size >= w.k else size
    along = -1 if transpose_w else -2
    if w.group_size is None or along not in w.axis:
        return None
    size = w.group_size[w.axis.index(along)]
    return None if size >= w.shape[along] else size


def over_rows(
    product: Callable[[jax.Array, jax.Array | None], jax.Array],
    static: Linear,
    x: jax.Array,
    act_scale: jax.Array | None,
    act_offset: jax.Array | None,
    plain: Callable[[jax.Array, jax.Array | None], jax.Array] | None = None,
) -> jax.Array:
    """`product(codes, scales)` of quantized activations; an offset takes one more row.

    Products are linear: the offset is that many times the product of a row of ones. That
    row is one of the same product, unless there is a `plain` one for it.
    """
    assert static.act is not None
    codes, scale, offset = encode_activations(x, static.act, act_scale, act_offset)
    if offset is None:
        return product(codes, jnp.broadcast_to(scale, (*x.shape[:-1], 1)))
    ones = jnp.ones((*codes.shape[:-2], 1, codes.shape[-1]), codes.dtype)
    if plain is not None:
        return product(codes, None) * scale + plain(ones, None) * offset
    sums = product(jnp.concatenate([codes, ones], -2), None)
    return sums[..., :-1, :] * scale + sums[..., -1:, :] * offset


def _simulate(static, x, codes, scale, zero, act_scale, act_offset):
    """`linear` in floats: the same numbers while the sums of codes stay below 2^24."""
    group, transpose_w = static.group_size, static.transpose_w
    if static.act is None:
        return scaled_dot(x, codes, scale, zero, group, transpose_w)
    columns = jnp.swapaxes(scale, -1, -2) if transpose_w else scale
    zeros = jnp.swapaxes(zero, -1, -2) if transpose_w and zero is not None else zero

    def product(dot, x_codes, x_scale):
        return scaled_sums(dot, x_codes, codes, x_scale, columns, zeros, group, transpose_w)

    plain = functools.partial(product, float_dot)
    if static.act.grad_bits is None:
        return over_rows(plain, static, x, act_scale, act_offset)
    # The gradient of the row of ones is a sum over all rows: it would set the scale of each
    # column, and stays in floats.
    rounded = functools.partial(
        product, functools.partial(quantized_gradient_dot, static.act.grad_bits)
    )
    return over_rows(rounded, static, x, act_scale, act_offset, plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _float8_linear(static, kinds, x, values, scale, zero, act_scale, act_offset):
    weight = jax.lax.bitcast_convert_type(values, jnp.dtype(kinds[1]))
    columns = jnp.swapaxes(scale, -1, -2) if static.transpose_w else scale
    if in_blocks(static.act):
        numbers, x_scale = encode_blocks(x, static.act)
        return scaled_matmul(
            numbers.astype(kinds[0]),
            weight,
            x_scale=x_scale,
            w_scale=columns.astype(x_scale.dtype),
            group_size=static.group_size,
            transpose_w=static.transpose_w,
        )
    product = lambda codes, x_scale: scaled_matmul(
        codes.astype(kinds[0]),
        weight,
        x_scale=x_scale,
        w_scale=columns,
        transpose_w=static.transpose_w,
    )
    return over_rows(product, static, x, act_scale, act_offset)


def _float8_forward(static, kinds, *args):
    return _float8_linear(static, kinds, *args), args


def _float8_backward(static, kinds, residuals, g):
    """Straight through the rounding of the activations, as in training."""
    x, values, scale, zero, act_scale, act_offset = residuals
    weight = jax.lax.bitcast_convert_type(values, jnp.dtype(kinds[1])).astype(jnp.float32)
    run = lambda x, scale, act_scale: _simulate(
        static, x, weight, scale, zero, act_scale, act_offset
    )
    dx, dscale, dact = jax.vjp(run, x, scale, act_scale)[1](g)
    return dx, None, dscale, None, dact, None


_float8_linear.defvjp(_float8_forward, _float8_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def int_linear(static, x, values, scale, zero, act_scale, act_offset, bias, residual):
    k = x.shape[-1]
    check_sums(min(k, static.group_size or k), zero is not None)
    problem = Problem(
        m=x.shape[-2],
        k=k,
        n=static.panels or values.shape[-2 if static.transpose_w else -1],
        bits=static.bits,
        group_size=static.group_size,
        dtype=x.dtype.name,
    )
    operands = (x, values, scale, zero, act_scale, act_offset, bias, residual)
    return dispatch(_table(static), problem, None, *operands)


def _table(static: Linear) -> tuple[Implementation, ...]:
    """Rows quantized and multiplied in one native call, else in two steps."""

    def refuses(problem: Problem, platform: str) -> str | None:
        assert static.act is not None
        if not static.act.qtype.symmetric:
            return "its rows are quantized symmetrically"
        return cpu_refuses(problem, platform)

    does = "native: rows quantized inside, uint8 x int8 -> int32"
    steps = functools.partial(_in_steps, static, None)
    return (
        Implementation("cpu", does, functools.partial(_cpu, static), refuses),
        Implementation("reference", "rows quantized, then int8_matmul", steps),
    )


def _in_steps(
    static, implementation, x, values, scale, zero, act_scale, act_offset, bias, residual
):
    columns = jnp.swapaxes(scale, -1, -2) if static.transpose_w else scale
    zeros = jnp.swapaxes(zero, -1, -2) if static.transpose_w and zero is not None else zero
    options = dict(
        w_scale=columns,
        w_zero_point=zeros,
        group_size=static.group_size,
        implementation=implementation,
    )
    if _is_w4a8(static.bits, values, static.transpose_w):
        product = lambda x_codes, x_scale: w4a8_matmul(
            x_codes.astype(jnp.int8), values, x_scale=x_scale, **options
        )
    else:
        product = lambda x_codes, x_scale: int8_matmul(
            x_codes.astype(jnp.int8),
            decode(values, static.bits, x.shape[-1], static.transpose_w, static.panels),
            x_scale=x_scale,
            transpose_w=static.transpose_w,
            **options,
        )
    out = over_rows(product, static, x, act_scale, act_offset)
    return finish(out, bias, static.activation, residual)


def _cpu(static, x, values, scale, zero, act_scale, act_offset, bias, residual):
    from jaxcompress.kernels.quantized_matmul import cpu as kernel

    x_scale = act_scale
    if not (static.act.static or static.act.per_token):
        x_scale = encode_activations(x, static.act, None)[1]
    lead = x.shape[:-1]
    if x.ndim == 2:
        x, values, scale, zero = batched(x, values, scale, zero)
        bias, residual = (None if a is None else a[None] for a in (bias, residual))
    if x_scale is not None and x_scale.size == 1:
        x_scale = x_scale.reshape((1,) * x.ndim)
    out = kernel.quantized_matmul(
        x,
        values,
        scale,
        zero,
        x_scale,
        bias,
        residual,
        activation=static.activation,
        otherwise=_cpu_by_xla(static, *(a is not None for a in (zero, x_scale, bias, residual))),
        panels=static.panels,
        transpose_w=static.transpose_w,
        bits=static.bits,
        group_size=static.group_size,
        high=static.act.qtype.high,
    )
    return out.reshape(*lead, out.shape[-1])


@functools.cache
def _cpu_by_xla(static, *has):
    """What an exported program does for the native call, with scales `[b, g, n]`."""
    turn = lambda s: jnp.swapaxes(s, -1, -2) if static.transpose_w else s

    def run(x, values, scale, *rest):
        zero, x_scale, bias, residual = in_places(has, rest)
        zero = None if zero is None else turn(zero)
        given = static
        if x_scale is not None:
            act = dataclasses.replace(static.act, per_token=False, static=True)
            given = dataclasses.replace(static, act=act)
        scale = turn(scale)
        return _in_steps(given, None, x, values, scale, zero, x_scale, None, bias, residual)

    return run


def _int_forward(static, *args):
    return int_linear(static, *args), args


def _int_backward(static, residuals, g):
    """Straight through the rounding of the activations, as in training."""
    x, values, scale, zero, act_scale, act_offset, bias, residual = residuals
    codes = decode(values, static.bits, x.shape[-1], static.transpose_w, static.panels)
    codes = codes.astype(jnp.float32)

    def run(x, scale, act_scale, act_offset, bias, residual):
        out = _simulate(static, x, codes, scale, zero, act_scale, act_offset)
        return finish(out, bias, static.activation, residual)

    inputs = (x, scale, act_scale, act_offset, bias, residual)
    dx, dscale, *others = jax.vjp(run, *inputs)[1](g)
    return dx, None, dscale, None, *others


int_linear.defvjp(_int_forward, _int_backward)
