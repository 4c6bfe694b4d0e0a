"""`int8_matmul`: the product of two int8 arrays, exact in int32, and its scales."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxcompress.ops._choice import Implementation, Problem, dispatch
from jaxcompress.ops._cpu import cpu_refuses
from jaxcompress.ops._epilogue import finish, in_places
from jaxcompress.ops._kernels import blocks_of, call_kernel, chip, no_pallas_tpu, no_triton
from jaxcompress.ops._operands import (
    check_scales,
    check_sums,
    matmul_shape,
    one_batch,
    row_scales,
    spread,
)

__all__ = ["int8_matmul"]


@dataclasses.dataclass(frozen=True)
class _Static:
    group_size: int | None
    transpose_w: bool
    dtype: str
    implementation: str | None
    activation: str | None = None


def int8_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    x_scale: jax.Array | None = None,
    w_scale: jax.Array | None = None,
    w_zero_point: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Literal["relu", "gelu", "silu"] | None = None,
    out_scale: jax.Array | None = None,
    group_size: int | None = None,
    transpose_w: bool = False,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies int8 by int8, sums in int32, scales the sums, and does what follows them.

    `y[m, n] = act(b[n] + sum_g s_w[g, n] s_x[m] (sum_(k in g) x[m, k] (w[k, n] - z[g, n])))`

    Args:
      x: int8 `[..., m, k]`.
      w: int8 `[k, n]`, or `[..., k, n]` with the leading dimensions of `x`; with
        `transpose_w`, `[n, k]`.
      x_scale: a scale for each row of `x`, `[..., m, 1]` or anything that broadcasts
        to it; None for 1.
      w_scale: a scale for each column and group of `w`, `[..., g, n]` (`g` is 1 without
        groups); None for 1.
      w_zero_point: int8, of the shape of `w_scale`; None for 0.
      bias: floats `[..., 1, n]`, the leading dimensions those of `w`; None for 0.
      activation: "relu", "gelu" (in its form with tanh), "silu", or None.
      out_scale: floats that broadcast to the shape of `bias`: the result is divided by
        them and rounded to int8 codes from -127 to 127, for the next product. None for not.
      group_size: the neighbouring `k` that share a scale; it need not divide `k`.
      transpose_w: whether `w` comes as `[n, k]`; `w_scale` is `[..., g, n]` all the same.
      dtype: of the scaled result.
      implementation: "cpu" (the native kernels: all but `out_scale` inside), "xla" (uint8 x
        int8 on the CPU), "pallas_tpu" or "triton" (all of the formula in the kernel, no
        groups), "pallas_gpu" (the same on sm_90 and 100, compiled and never run), "reference",
        or None for the first that serves the shape on the platform.

    Returns:
      `[..., m, n]`: exact int32 with neither scales, bias nor activation, of `dtype` with any,
      int8 with an `out_scale`. If not int8, differentiable in the scales and the bias.

    Raises:
      TypeError: an operand is not int8.
      ValueError: shapes do not match, the activation is none of these, a sum has more than
        131071 products (65793 with zero points) and may leave int32, or the implementation
        cannot run, with the reason.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> x, w = jnp.full((2, 3), 100, jnp.int8), jnp.full((3, 4), -100, jnp.int8)
    >>> int(jc.ops.int8_matmul(x, w)[0, 0])
    -30000
    >>> then = dict(bias=jnp.full((1, 4), 31e3), activation="relu", out_scale=jnp.full((1, 1), 10))
    >>> int(jc.ops.int8_matmul(x, w, **then)[0, 0])
    100

    Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877.
    """
    for name, operand in (("x", x), ("w", w)):
        if operand.dtype != jnp.int8:
            raise TypeError(f"int8_matmul takes int8; {name} is {operand.dtype}")
    lead, m, k, n = matmul_shape(x.shape, w.shape, transpose_w)
    check_scales({"w_scale": w_scale, "w_zero_point": w_zero_point}, w.shape[:-2], k, n, group_size)
    if group_size is not None and w_scale is None:
        raise ValueError("group_size needs a w_scale of shape [..., g, n]")
    if w_zero_point is not None and w_zero_point.dtype != jnp.int8:
        raise TypeError(f"int8_matmul takes int8; w_zero_point is {w_zero_point.dtype}")
    check_sums(min(k, group_size or k), w_zero_point is not None)
    check_scales({"bias": bias, "out_scale": out_scale}, w.shape[:-2], k, n, None)
    x_scale = row_scales("x_scale", x_scale, (*lead, m, 1))
    if activation is not None and activation not in _ACTIVATIONS:
        names = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"expected an activation of {names}, or None; got {activation!r}")
    if w.ndim == 2:  # one product of all rows
        rows = math.prod(lead) * m
        x, w = x.reshape(1, rows, k), w[None]
        x_scale = None if x_scale is None else x_scale.reshape(1, rows, 1)
        w_scale = None if w_scale is None else w_scale[None]
        w_zero_point = None if w_zero_point is None else w_zero_point[None]
        bias, out_scale = (None if a is None else a[None] for a in (bias, out_scale))
    real = any(a is not None for a in (x_scale, w_scale, bias, activation))
    kind = jnp.int8 if out_scale is not None else dtype if real else jnp.int32
    static = _Static(group_size, transpose_w, jnp.dtype(kind).name, implementation, activation)
    out = _matmul(static, x, w, x_scale, w_scale, w_zero_point, bias, out_scale)
    return out.reshape(*lead, m, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, w, *rest):
    problem = Problem(
        m=x.shape[-2],
        k=x.shape[-1],
        n=w.shape[-2] if static.transpose_w else w.shape[-1],
        group_size=static.group_size,
        transpose_w=static.transpose_w,
    )
    return dispatch(_table(static), problem, static.implementation, x, w, *rest)


def _forward(static, *args):
    return _matmul(static, *args), args


def _backward(static, residuals, g):
    x, w, x_scale, w_scale, zero, bias, _ = residuals
    if static.dtype == "int8":  # codes have no derivative
        return (None,) * len(residuals)
    run = lambda x_scale, w_scale, bias: _reference(static, x, w, x_scale, w_scale, zero, bias)
    dx_scale, dw_scale, dbias = jax.vjp(run, x_scale, w_scale, bias)[1](g)
    return None, None, dx_scale, dw_scale, None, dbias, None


_matmul.defvjp(_forward, _backward)


def scaled_sums(
    multiply: Callable[[jax.Array, jax.Array, bool], jax.Array],
    x: jax.Array,
    w: jax.Array,
    x_scale: jax.Array | None,
    w_scale: jax.Array | None,
    zero: jax.Array | None,
    group_size: int | None,
    transpose_w: bool,
) -> jax.Array:
    """The formula of `int8_matmul` around any product of codes, integer or float.

    Training multiplies whole floats here and inference multiplies integers; everything
    else, down to the order of the roundings, is this one function.
    """
    grouped = group_size is not None and group_size < x.shape[-1]
    if group_size is not None and grouped:
        groups = -(-x.shape[-1] // group_size)
        pad = groups * group_size - x.shape[-1]
        w = jnp.swapaxes(w, -1, -2) if transpose_w else w
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
        w = jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, pad), (0, 0)])
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, group_size), -2, -3)
        w = w.reshape(*w.shape[:-2], groups, group_size, w.shape[-1])
        # One row of scales for each group: [..., g, 1, n] against sums [..., g, m, n].
        w_scale, zero = (None if s is None else s[..., :, None, :] for s in (w_scale, zero))
        transpose_w = False
    sums = multiply(x, w, transpose_w)
    if zero is not None:
        rows = jnp.sum(x, -1, dtype=sums.dtype, keepdims=True)
        sums = sums - rows * zero.astype(sums.dtype)
    if x_scale is None and w_scale is None:
        return sums
    sums = sums.astype(jnp.float32)
    if grouped and w_scale is not None:
        sums, w_scale = jnp.sum(sums * w_scale.astype(jnp.float32), -3), None
    if x_scale is not None:
        sums = sums * x_scale.astype(jnp.float32)
    return sums if w_scale is None else sums * w_scale.astype(jnp.float32)


_ACTIVATIONS = ("relu", "gelu", "silu")


def _reference(static, *operands):
    return _finished(static, integer_dot, *operands)


def _finished(static, multiply, x, w, x_scale, w_scale, zero, bias=None, out_scale=None):
    """The formula around any product of integers, step by step."""
    sums = scaled_sums(
        multiply, x, w, x_scale, w_scale, zero, static.group_size, static.transpose_w
    )
    sums = finish(sums, bias, static.activation, None)
    return _rounded(sums, out_scale).astype(static.dtype)


def _rounded(out, out_scale):
    """Codes for the next product, if it is given their scale."""
    if out_scale is None:
        return out
    return jnp.clip(jnp.round(out.astype(jnp.float32) / out_scale.astype(jnp.float32)), -127, 127)


def integer_dot(x: jax.Array, w: jax.Array, transpose_w: bool) -> jax.Array:
    batch = tuple(range(x.ndim - 2))
    contract = ((x.ndim - 1,), (w.ndim - 1 if transpose_w else w.ndim - 2,))
    return lax.dot_general(x, w, (contract, (batch, batch)), preferred_element_type=jnp.int32)


def _cpu(static, x, w, x_scale, w_scale, zero, bias, out_scale):
    """Sums alone are integers; scales, and what follows them, are done in the same call."""
    if all(a is None for a in (x_scale, w_scale, bias, static.activation)):
        from jaxcompress.kernels.int8_matmul import cpu as sums

        operands = (x, w, x_scale, w_scale, zero, bias, out_scale)
        return _scaled(static, sums.int8_matmul, *operands)
    from jaxcompress.kernels.quantized_matmul import cpu as kernel

    ones = jnp.ones((1,) * x.ndim, jnp.float32)
    w_scale = ones if w_scale is None else w_scale
    lead, n = w.shape[:-2], w.shape[-2 if static.transpose_w else -1]
    groups = max(1, -(-x.shape[-1] // static.group_size)) if static.group_size else 1

    def spread(s):
        s = jnp.broadcast_to(s, (*lead, groups, n))
        return jnp.swapaxes(s, -1, -2) if static.transpose_w else s

    out = kernel.quantized_matmul(
        x,
        w,
        spread(w_scale),
        None if zero is None else spread(zero),
        ones if x_scale is None else x_scale,
        bias,
        activation=static.activation,
        otherwise=_by_xla(static, zero is not None, bias is not None),
        panels=None,
        transpose_w=static.transpose_w,
        bits=8,
        group_size=static.group_size,
        high=None,
    )
    return _rounded(out, out_scale).astype(static.dtype)


@functools.cache
def _by_xla(static, has_zero, has_bias):
    """What an exported program does for the native call."""
    single = dataclasses.replace(static, dtype="float32")

    def run(x, w, w_scale, *rest):
        zero, x_scale, bias = in_places((has_zero, True, has_bias), rest)
        return _xla(single, x, w, x_scale, w_scale, zero, bias, None)

    return run


def _xla(static, *operands):
    from jaxcompress.kernels.int8_matmul import xla as kernel

    return _scaled(static, kernel.int8_matmul, *operands)


def _scaled(static, kernel, *operands):
    """Sums by a kernel, all else by XLA."""
    multiply = lambda x, w, transpose_w: kernel(x, w, transpose_w=transpose_w)
    return _finished(static, multiply, *operands)


def _pallas_tpu(static, *operands):
    from jaxcompress.kernels.int8_matmul import pallas_tpu as kernel

    return _fused(static, kernel.int8_matmul, chip("tpu"), False, *operands)


def _triton(static, *operands):
    from jaxcompress.kernels.int8_matmul import triton as kernel

    return _fused(static, kernel.int8_matmul, chip("cuda") or chip("rocm"), True, *operands)


def _pallas_gpu(static, *operands):
    from jaxcompress.kernels.int8_matmul import pallas_gpu as kernel

    return _fused(static, kernel.int8_matmul, chip("cuda"), True, *operands)


def _fused(static, kernel, chip, is_cut, x, w, x_scale, w_scale, zero, bias, out_scale):
    """Leading dimensions as one, scales spread over rows and columns, as kernels take them."""
    *lead, m, k = x.shape
    if k == 0:  # a kernel has no step in which to add a bias
        return _reference(static, x, w, x_scale, w_scale, zero, bias, out_scale)
    n = w.shape[-2] if static.transpose_w else w.shape[-1]
    run = functools.partial(
        kernel,
        transpose_w=static.transpose_w,
        activation=static.activation,
        dtype=static.dtype,
        chip=chip,
    )
    letters = ("bmk", "bnk" if static.transpose_w else "bkn", "bm1", *["b1n"] * 4)
    out = call_kernel(
        run,
        letters,
        one_batch(x),
        one_batch(w),
        spread(x_scale, *lead, m, 1),
        spread(w_scale, *lead, 1, n),
        spread(zero, *lead, 1, n),
        spread(bias, *lead, 1, n),
        spread(out_scale, *lead, 1, n),
        is_cut=is_cut,
    )
    return out.reshape(*lead, m, n)


def _table(static: _Static | None) -> tuple[Implementation, ...]:
    def bound(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return functools.partial(run, static)

    fused = "int8 x int8 -> int32, all that follows in the kernel"
    native = "native uint8 x int8 -> int32, all that follows inside"
    tpu_blocks, gpu_blocks, mosaic_blocks = (
        blocks_of("int8_matmul", backend, lambda p: (p.m, p.n, p.k))
        for backend in ("pallas_tpu", "triton", "pallas_gpu")
    )
    refuses_tpu = lambda problem, platform: no_pallas_tpu(platform) or _has_groups(problem)
    refuses_gpu = lambda problem, platform: no_triton(platform) or _has_groups(problem)
    return (
        Implementation("cpu", native, bound(_cpu), cpu_refuses),
        Implementation("xla", "uint8 x int8 -> int32 by XLA", bound(_xla), _xla_refuses),
        Implementation("pallas_tpu", fused, bound(_pallas_tpu), refuses_tpu, _defers, tpu_blocks),
        Implementation("triton", fused, bound(_triton), refuses_gpu, _defers, gpu_blocks),
        Implementation(
            "pallas_gpu",
            fused,
            bound(_pallas_gpu),
            _mosaic_refuses,
            lambda problem, platform: "no device has run it",
            mosaic_blocks,
        ),
        Implementation("reference", "int8 x int8 -> int32 by lax.dot_general", bound(_reference)),
    )


def _xla_refuses(problem: Problem, platform: str) -> str | None:
    if platform != "cpu":
        return f"it is for the CPU, and {platform} multiplies int8 by itself"
    return None


def _mosaic_refuses(problem: Problem, platform: str) -> str | None:
    here = chip("cuda") if platform == "cuda" else None
    if here not in ("9.0", "10.0"):
        return f"it is for NVIDIA's 9.0 and 10.0; {here or 'no such chip'} is at hand"
    if jax.__version_info__[:2] != (0, 10):
        return f"it is compiled with jax 0.10 in the checks, not with {jax.__version__}"
    return _has_groups(problem)


def _has_groups(problem: Problem) -> str | None:
    return f"it scales whole columns, not groups of {problem.group}" if problem.group else None


def _defers(problem: Problem, platform: str) -> str | None:
    if platform == "tpu":
        return "XLA multiplies int8 by itself, and no device has measured it against that"
    return "XLA multiplies int8 by itself, faster on an H100 at 256 rows and at 4096"


def table() -> tuple[Implementation, ...]:
    """The implementations, best first."""
    return _table(None)
