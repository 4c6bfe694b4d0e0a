"""`w4a8_matmul`: int8 activations times packed int4 weights, exact within a group."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcompress.arrays._packing import packed_size, unpack
from jaxcompress.ops._choice import Implementation, Problem, dispatch
from jaxcompress.ops._cpu import cpu_refuses
from jaxcompress.ops._int8_matmul import integer_dot, scaled_sums
from jaxcompress.ops._kernels import (
    blocks_of,
    call_kernel,
    chip,
    no_pallas_tpu,
    no_triton,
    not_cut,
    small_weight,
)
from jaxcompress.ops._operands import check_scales, check_sums, matmul_shape, one_batch, spread

__all__ = ["w4a8_matmul"]

_BITS = 4


@dataclasses.dataclass(frozen=True)
class _Static:
    group_size: int | None
    dtype: str
    implementation: str | None


def w4a8_matmul(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    x_scale: jax.Array | None = None,
    w_zero_point: jax.Array | None = None,
    group_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies int8 by packed int4, sums a group in int32, and scales the sums.

    `y[m, n] = s_x[m] sum_g s_w[g, n] (sum_(k in g) x[m, k] (w[k, n] - z[g, n]))`

    Args:
      x: int8 `[..., m, k]`.
      w: uint8 bit planes of int4 codes along `k`, as `QuantizedArray` stores them,
        `[32 ceil(k / 64), n]`, or with the leading dimensions of `x`.
      w_scale: a scale for each group and column, `[..., g, n]` (`g` is 1 without groups).
      x_scale: a scale for each row of `x`, `[..., m, 1]` or anything that broadcasts
        to it; None for 1.
      w_zero_point: int8 codes, -8 to 7, of the shape of `w_scale`; None for 0.
      group_size: the neighbouring `k` that share a scale; it need not divide `k`.
      dtype: of the result.
      implementation: "pallas_tpu" or "triton" (unpacked in fast memory, scaled in the
        kernel), "cpu", "xla" or "reference" (unpacked, then that of `int8_matmul`), or
        None for the first that serves the shape on the platform.

    Returns:
      `[..., m, n]` of `dtype`. Differentiable in the scales.

    Raises:
      TypeError: `x` is not int8, or `w` not packed.
      ValueError: shapes do not match, a group has more than 131071 products (65793 with
        zero points), or the implementation cannot run, with the reason.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jnp.full((64, 4), 7.0)
    >>> q = jc.quantize.quantize({"w": w}, {"w": jc.quantize.w4a8()})["w"]
    >>> x = jnp.full((2, 64), 100, jnp.int8)
    >>> float(jc.ops.w4a8_matmul(x, q.values, q.scale)[0, 0])
    44800.0

    Lin et al., 2024, QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM
    Serving, arXiv:2405.04532.
    """
    if x.dtype != jnp.int8:
        raise TypeError(f"w4a8_matmul takes int8 activations; x is {x.dtype}")
    if w.dtype != jnp.uint8:
        raise TypeError(f"w4a8_matmul takes int4 packed as uint8; w is {w.dtype}")
    if w_zero_point is not None and w_zero_point.dtype != jnp.int8:
        raise TypeError(f"w4a8_matmul takes int8 zero points; w_zero_point is {w_zero_point.dtype}")
    rows = packed_size(x.shape[-1], _BITS)
    if w.ndim < 2 or w.shape[-2] != rows:
        raise ValueError(f"{x.shape[-1]} codes take {rows} bytes; w has the shape {w.shape}")
    unpacked = (*w.shape[:-2], x.shape[-1], w.shape[-1])
    lead, m, k, n = matmul_shape(x.shape, unpacked, False)
    check_scales({"w_scale": w_scale, "w_zero_point": w_zero_point}, w.shape[:-2], k, n, group_size)
    check_sums(min(k, group_size or k), w_zero_point is not None)
    if w.ndim == 2:  # one product of all rows
        count = math.prod(lead) * m
        x, w, w_scale = x.reshape(1, count, k), w[None], w_scale[None]
        if x_scale is not None:
            x_scale = jnp.broadcast_to(x_scale, (*lead, m, 1)).reshape(1, count, 1)
        w_zero_point = None if w_zero_point is None else w_zero_point[None]
    static = _Static(group_size, jnp.dtype(dtype).name, implementation)
    return _matmul(static, x, w, w_scale, x_scale, w_zero_point).reshape(*lead, m, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, w, w_scale, x_scale, zero):
    problem = Problem(
        m=x.shape[-2],
        k=x.shape[-1],
        n=w.shape[-1],
        bits=_BITS,
        group_size=static.group_size,
        packed=True,
    )
    return dispatch(_table(static), problem, static.implementation, x, w, w_scale, x_scale, zero)


def _forward(static, *args):
    return _matmul(static, *args), args


def _backward(static, residuals, g):
    x, w, w_scale, x_scale, zero = residuals
    run = lambda w_scale, x_scale: _reference(static, x, w, w_scale, x_scale, zero)
    dw_scale, dx_scale = jax.vjp(run, w_scale, x_scale)[1](g)
    return None, None, dw_scale, dx_scale, None


_matmul.defvjp(_forward, _backward)


def _unpacked(multiply, static, x, w, w_scale, x_scale, zero):
    """The codes as int8, a byte each, then a product of int8."""
    codes = unpack(w, _BITS, x.shape[-1], -2)
    sums = scaled_sums(multiply, x, codes, x_scale, w_scale, zero, static.group_size, False)
    return sums.astype(static.dtype)


def _reference(static, *operands):
    return _unpacked(integer_dot, static, *operands)


def _cpu(static, *operands):
    from jaxcompress.kernels.int8_matmul import cpu as kernel

    return _unpacked(lambda x, w, transpose_w: kernel.int8_matmul(x, w), static, *operands)


def _xla(static, *operands):
    from jaxcompress.kernels.int8_matmul import xla as kernel

    return _unpacked(lambda x, w, transpose_w: kernel.int8_matmul(x, w), static, *operands)


def _pallas_tpu(static, *operands):
    from jaxcompress.kernels.w4a8_matmul import pallas_tpu as kernel

    return _fused(static, kernel.w4a8_matmul, chip("tpu"), False, *operands)


def _triton(static, *operands):
    from jaxcompress.kernels.w4a8_matmul import triton as kernel

    return _fused(static, kernel.w4a8_matmul, chip("cuda") or chip("rocm"), True, *operands)


def _fused(static, kernel, chip, is_cut, x, w, w_scale, x_scale, zero):
    """Leading dimensions as one, scales spread over rows and columns, as kernels take them."""
    *lead, m, k = x.shape
    n, group = w.shape[-1], static.group_size
    groups = -(-k // group) if group and group < k else 1
    run = functools.partial(kernel, group_size=group, dtype=static.dtype, chip=chip)
    out = call_kernel(
        run,
        ("bmk", "bpn", "bgn", "bm1", "bgn"),
        one_batch(x),
        one_batch(w),
        spread(w_scale, *lead, groups, n),
        spread(x_scale, *lead, m, 1),
        spread(zero, *lead, groups, n),
        is_cut=is_cut,
    )
    return out.reshape(*lead, m, n)


def _pallas_tpu_refuses(problem: Problem, platform: str) -> str | None:
    # A TPU's matrix unit sums 128 products at a time, and its registers are as wide.
    return no_pallas_tpu(platform) or _groups_refused(problem, 128)


def _triton_refuses(problem: Problem, platform: str) -> str | None:
    return no_triton(platform) or _groups_refused(problem, 32)


def _groups_refused(problem: Problem, least: int) -> str | None:
    group = problem.group
    if group and (group < least or group & (group - 1)):
        return f"its groups are powers of two from {least} on, not {group}"
    return None


def _defers(problem: Problem, platform: str) -> str | None:
    return small_weight(problem) or not_cut(platform)


def _xla_refuses(problem: Problem, platform: str) -> str | None:
    return None if platform == "cpu" else "it is for the CPU"


def _table(static: _Static | None) -> tuple[Implementation, ...]:
    def bound(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return functools.partial(run, static)

    tpu_blocks, gpu_blocks = (
        blocks_of("w4a8_matmul", backend, lambda p: (p.m, p.n, p.k, p.group))
        for backend in ("pallas_tpu", "triton")
    )
    fused = "int8 x int4 -> int32 within a group, unpacked and scaled in the kernel"
    native, xla = (
        "unpacked, then native uint8 x int8 -> int32",
        "unpacked, then uint8 x int8 by XLA",
    )
    reference = "unpacked, then int8 x int8 -> int32 by lax.dot_general"
    return (
        Implementation("cpu", native, bound(_cpu), cpu_refuses),
        Implementation("xla", xla, bound(_xla), _xla_refuses),
        Implementation(
            "pallas_tpu", fused, bound(_pallas_tpu), _pallas_tpu_refuses, _defers, tpu_blocks
        ),
        Implementation("triton", fused, bound(_triton), _triton_refuses, _defers, gpu_blocks),
        Implementation("reference", reference, bound(_reference)),
    )


def table() -> tuple[Implementation, ...]:
    """The implementations, best first."""
    return _table(None)
