"""`quantized_matmul`: float activations times integer weights, decoded on the way."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxcompress.arrays._granularity import expand
from jaxcompress.arrays._packing import packed_size, unpack
from jaxcompress.arrays._panels import from_panels
from jaxcompress.ops._choice import Implementation, Problem, dispatch
from jaxcompress.ops._cpu import cpu_refuses
from jaxcompress.ops._epilogue import finish, in_places
from jaxcompress.ops._int8_matmul import scaled_sums
from jaxcompress.ops._kernels import (
    blocks_of,
    call_kernel,
    chip,
    many_rows,
    no_pallas_tpu,
    no_triton,
    not_cut,
    small_weight,
)
from jaxcompress.ops._operands import MAX_K_ZERO_POINT, check_scales, matmul_shape, one_batch

__all__ = ["quantized_matmul"]


@dataclasses.dataclass(frozen=True)
class _Static:
    bits: int
    group_size: int | None
    transpose_w: bool
    dtype: str
    implementation: str | None
    panels: int | None = None  # the columns of a weight that comes in panels
    activation: str | None = None


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    bits: int = 8,
    group_size: int | None = None,
    transpose_w: bool = False,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies floats by integer weights that are decoded on the way.

    `y[m, n] = sum_k x[m, k] (w[k, n] - z[g(k), n]) s[g(k), n]`

    Args:
      x: f32, bf16 or f16 `[..., m, k]`.
      w: int8 codes `[k, n]`, or below eight bits the uint8 bit planes that
        `QuantizedArray` stores along `k`; or either with the leading dimensions of `x`;
        with `transpose_w`, `[n, k]`.
      scale: `[..., g, n]`, where `g` is 1, or the number of groups; with
        `transpose_w`, `[..., n, g]`.
      zero_point: int8, of the shape of `scale`; None for 0.
      bits: of a code, 2 to 8.
      group_size: the neighbouring `k` that share a scale; it need not divide `k`.
      transpose_w: whether `w` comes as `[n, k]`.
      dtype: of the result; that of `x` by default.
      implementation: "cpu" (the native kernels) and "xla" (on the CPU: each row of
        activations as int8 digits, exact down to 2^-28 of its largest; a row that is not
        finite becomes NaN), "pallas_tpu" or "triton" (decoded in registers), "reference",
        or None for the first that serves the shape on the platform.

    Returns:
      `[..., m, n]` of `dtype`, summed in float32 or exactly. Differentiable in `x` and
      `scale`.

    Raises:
      TypeError: `x` is not floating, or `w` neither int8 nor packed uint8.
      ValueError: shapes do not match, or the implementation cannot run.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w, scale = jnp.full((3, 4), 100, jnp.int8), jnp.full((1, 4), 0.01)
    >>> float(jc.ops.quantized_matmul(jnp.ones((2, 3)), w, scale)[0, 0])
    3.0

    Frantar et al., 2024, MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on
    Large Language Models, arXiv:2408.11743.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"quantized_matmul takes floating activations; x is {x.dtype}")
    if w.dtype not in (jnp.int8, jnp.uint8) or (w.dtype == jnp.uint8 and bits == 8):
        raise TypeError(f"w must be int8, or packed uint8 of 2 to 7 bits; it is {w.dtype}")
    shape = list(w.shape)
    along = w.ndim - 1 if transpose_w else w.ndim - 2
    if w.dtype == jnp.uint8:
        if shape[along] != packed_size(x.shape[-1], bits):
            raise ValueError(
                f"{x.shape[-1]} codes of {bits} bits take {packed_size(x.shape[-1], bits)} "
                f"bytes along axis {along}; w has the shape {w.shape}"
            )
        shape[along] = x.shape[-1]
    lead, m, k, n = matmul_shape(x.shape, tuple(shape), transpose_w)
    scales = {"scale": scale, "zero_point": zero_point}
    check_scales(scales, w.shape[:-2], k, n, group_size, transpose_w)
    static = _Static(
        bits, group_size, transpose_w, jnp.dtype(dtype or x.dtype).name, implementation
    )
    if w.ndim == 2:
        x, w, scale, zero_point = batched(x, w, scale, zero_point)
    return _matmul(static, x, w, scale, zero_point, None, None).reshape(*lead, m, n)


def multiply_stored(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    panels: int | None,
    bits: int,
    group_size: int | None,
    transpose_w: bool,
    dtype: DTypeLike,
    activation: str | None,
) -> jax.Array:
    """`quantized_matmul` of a weight that fits, and what follows it.

    With `panels`, of so many columns, `w` is `[*lead, n / 16, rows / 4, 16, 4]`.
    """
    lead = x.shape[:-1]
    if x.ndim == 2:
        x, w, scale, zero_point = batched(x, w, scale, zero_point)
        bias, residual = (None if a is None else a[None] for a in (bias, residual))
    static = _Static(bits, group_size, transpose_w, jnp.dtype(dtype).name, None, panels, activation)
    out = _matmul(static, x, w, scale, zero_point, bias, residual)
    return out.reshape(*lead, out.shape[-1])


def batched(x: jax.Array, *others: jax.Array | None) -> list[Any]:
    """All rows of `x` as one batch `[1, m, k]`, and what belongs to it likewise."""
    rows = math.prod(x.shape[:-1])
    return [x.reshape(1, rows, x.shape[-1]), *(None if a is None else a[None] for a in others)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, w, scale, zero_point, bias, residual):
    problem = Problem(
        m=x.shape[-2],
        k=x.shape[-1],
        n=static.panels or (w.shape[-2] if static.transpose_w else w.shape[-1]),
        bits=static.bits,
        group_size=static.group_size,
        dtype=x.dtype.name,
        packed=w.dtype == jnp.uint8 and static.bits < 8,
        transpose_w=static.transpose_w,
    )
    operands = (x, w, scale, zero_point, bias, residual)
    return dispatch(_table(static), problem, static.implementation, *operands)


def _forward(static, *operands):
    return _matmul(static, *operands), operands


def _backward(static, operands, g):
    x, w, scale, zero_point, *more = operands

    def run(x, scale, *more):
        return _finished(_reference, static, x, w, scale, zero_point, *more)

    dx, dscale, *dmore = jax.vjp(run, x, scale, *more)[1](g)
    return dx, None, dscale, None, *dmore


_matmul.defvjp(_forward, _backward)


def _finished(run, static, x, w, scale, zero_point, bias, residual):
    """A product, and what follows it, step by step."""
    if bias is None and residual is None and static.activation is None:
        return run(static, x, w, scale, zero_point)
    single = dataclasses.replace(static, dtype="float32")
    out = run(single, x, w, scale, zero_point)
    return finish(out, bias, static.activation, residual).astype(static.dtype)


def _reference(
    static: _Static, x: jax.Array, w: jax.Array, scale: jax.Array, zero_point: jax.Array | None
) -> jax.Array:
    codes = _codes(static, x, w)
    out = scaled_dot(x, codes, scale, zero_point, static.group_size, static.transpose_w)
    return out.astype(static.dtype)


def _codes(static: _Static, x: jax.Array, w: jax.Array) -> jax.Array:
    """One int8 a weight."""
    return decode(w, static.bits, x.shape[-1], static.transpose_w, static.panels)


def decode(
    w: jax.Array, bits: int, k: int, transpose_w: bool, panels: int | None = None
) -> jax.Array:
    """One int8 a weight, from codes, bit planes, or `panels` columns in panels."""
    if panels is not None:
        w = from_panels(w, bits, k, panels, transpose_w=transpose_w)
    if w.dtype == jnp.int8:
        return w
    return unpack(w, bits, k, -1 if transpose_w else -2)


def _cpu(
    static: Any,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> jax.Array:
    """The activations as rows of int8 digits, by the native library."""
    from jaxcompress.kernels.quantized_matmul import cpu as kernel

    out = kernel.quantized_matmul(
        x,
        w,
        scale,
        zero_point,
        None,
        bias,
        residual,
        activation=static.activation,
        otherwise=_cpu_by_xla(static, *(a is not None for a in (zero_point, bias, residual))),
        panels=static.panels,
        transpose_w=static.transpose_w,
        bits=static.bits,
        group_size=static.group_size,
        high=None,
    )
    return out.astype(static.dtype)


@functools.cache
def _cpu_by_xla(
    static: _Static, has_zero: bool, has_bias: bool, has_residual: bool
) -> Callable[..., jax.Array]:
    """What an exported program does for the native call, with scales `[b, g, n]`."""
    single = dataclasses.replace(static, dtype="float32")
    turn = lambda s: jnp.swapaxes(s, -1, -2) if static.transpose_w else s

    def run(x, w, scale, *rest):
        zero, bias, residual = in_places((has_zero, has_bias, has_residual), rest)
        zero = None if zero is None else turn(zero)
        return _finished(_xla, single, x, w, turn(scale), zero, bias, residual)

    return run


def _cpu_refuses(problem: Problem, platform: str) -> str | None:
    return cpu_refuses(problem, platform) or _xla_refuses(problem, platform)


def _xla(
    static: _Static, x: jax.Array, w: jax.Array, scale: jax.Array, zero_point: jax.Array | None
) -> jax.Array:
    """The activations as rows of int8 digits, the products exact; see the kernel."""
    from jaxcompress.kernels.int8_matmul.xla import int8_matmul
    from jaxcompress.kernels.quantized_matmul import xla as kernel

    digits, row_scale = kernel.split(x)
    turn = lambda s: jnp.swapaxes(s, -1, -2) if static.transpose_w and s is not None else s
    sums = scaled_sums(
        lambda x, w, transpose_w: int8_matmul(x, w, transpose_w=transpose_w),
        digits,
        _codes(static, x, w),
        None,
        turn(scale),
        turn(zero_point),
        static.group_size,
        static.transpose_w,
    )
    return kernel.join(sums, row_scale).astype(static.dtype)


def _xla_refuses(problem: Problem, platform: str) -> str | None:
    if platform != "cpu":
        return "it is for the CPU"
    if problem.dtype not in ("float32", "bfloat16", "float16"):
        return f"{problem.dtype} has more digits than it makes"
    longest = min(problem.k, problem.group_size or problem.k)
    if longest > MAX_K_ZERO_POINT:
        return f"it sums at most {MAX_K_ZERO_POINT} products exactly, not {longest}"
    return None


def _pallas_tpu(static: _Static, *operands: jax.Array | None) -> jax.Array:
    from jaxcompress.kernels.quantized_matmul import pallas_tpu as kernel

    return _decoded(static, kernel.quantized_matmul, chip("tpu"), False, *operands)


def _triton(static: _Static, *operands: jax.Array | None) -> jax.Array:
    from jaxcompress.kernels.quantized_matmul import triton as kernel

    here = chip("cuda") or chip("rocm")
    return _decoded(static, kernel.quantized_matmul, here, True, *operands)


def _decoded(static, kernel, chip, is_cut, x, w, scale, zero):
    """Leading dimensions as one, a scale for each column, as kernels take them."""
    *lead, m, k = x.shape
    if static.panels is not None:
        w = from_panels(w, static.bits, k, static.panels, transpose_w=static.transpose_w)
    n = w.shape[-2] if static.transpose_w else w.shape[-1]
    groups = -(-k // static.group_size) if static.group_size and static.group_size < k else 1

    def columns(a):
        if a is None:
            return None
        a = jnp.swapaxes(a, -1, -2) if static.transpose_w else a
        return jnp.broadcast_to(a, (*lead, groups, n)).reshape(-1, groups, n)

    run = functools.partial(
        kernel,
        bits=static.bits,
        group_size=static.group_size,
        transpose_w=static.transpose_w,
        dtype=static.dtype,
        chip=chip,
    )
    rows = "k" if w.dtype == jnp.int8 else "p"  # of bit planes there are fewer
    letters = ("bmk", f"bn{rows}" if static.transpose_w else f"b{rows}n", "bgn", "bgn")
    operands = one_batch(x), one_batch(w), columns(scale), columns(zero)
    out = call_kernel(run, letters, *operands, is_cut=is_cut)
    return out.reshape(*lead, m, n)


def _kernel_refuses(problem: Problem, dtypes: tuple[str, ...]) -> str | None:
    group = problem.group
    if problem.dtype not in dtypes:
        return f"it takes {' and '.join(dtypes)}, not {problem.dtype}"
    if group and (group < 32 or group & (group - 1)):
        return f"its groups are powers of two from 32 on, not {group}"
    if problem.packed and problem.transpose_w:
        return "it unpacks bit planes along the rows of w, not along its columns"
    return None


def _pallas_tpu_refuses(problem: Problem, platform: str) -> str | None:
    return no_pallas_tpu(platform) or _kernel_refuses(problem, ("float32", "bfloat16"))


def _triton_refuses(problem: Problem, platform: str) -> str | None:
    return no_triton(platform) or _kernel_refuses(problem, ("float32", "bfloat16", "float16"))


def _kernel_defers(problem: Problem, platform: str) -> str | None:
    return small_weight(problem) or many_rows(problem, platform) or not_cut(platform)


def scaled_dot(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    group_size: int | None,
    transpose_w: bool,
) -> jax.Array:
    """The executable specification, in float32: scales after the sum where they can be.

    `codes` may be integers, or whole floats that carry a gradient.
    """
    along = -1 if transpose_w else -2
    k = x.shape[-1]
    scale = scale.astype(jnp.float32)
    codes = codes.astype(x.dtype)
    if group_size is not None and group_size < k:
        sizes = (group_size,)
        if zero_point is not None:
            codes = codes - expand(zero_point.astype(x.dtype), codes.shape, (along,), sizes)
        decoded = codes.astype(jnp.float32) * expand(scale, codes.shape, (along,), sizes)
        return float_dot(x, decoded.astype(x.dtype), transpose_w)
    if zero_point is not None:
        codes = codes - zero_point.astype(x.dtype)
    columns = jnp.swapaxes(scale, -1, -2) if transpose_w else scale
    return float_dot(x, codes, transpose_w) * columns


def float_dot(x: jax.Array, w: jax.Array, transpose_w: bool) -> jax.Array:
    """`x[..., m, k] @ w[..., k, n]`, summed in float32 or wider."""
    batch = tuple(range(x.ndim - 2))
    contract = ((x.ndim - 1,), (w.ndim - 1 if transpose_w else w.ndim - 2,))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, w, (contract, (batch, batch)), preferred_element_type=wide)


def _table(static: _Static | None) -> tuple[Implementation, ...]:
    def bound(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return functools.partial(_finished, run, static)

    native: Callable[..., jax.Array] = functools.partial(_cpu, static)
    tpu_blocks, gpu_blocks = (
        blocks_of("quantized_matmul", backend, lambda p: (p.m, p.n, p.k, p.group))
        for backend in ("pallas_tpu", "triton")
    )
    decodes = "a float product of the decoded weight"
    fused = "a float product of the weight, decoded in registers"
    return (
        Implementation("cpu", "activations as int8 digits, native", native, _cpu_refuses),
        Implementation("xla", "activations as int8 digits by XLA", bound(_xla), _xla_refuses),
        Implementation(
            "pallas_tpu",
            fused,
            bound(_pallas_tpu),
            _pallas_tpu_refuses,
            _kernel_defers,
            tpu_blocks,
        ),
        Implementation(
            "triton", fused, bound(_triton), _triton_refuses, _kernel_defers, gpu_blocks
        ),
        Implementation("reference", decodes, bound(_reference)),
    )


def table() -> tuple[Implementation, ...]:
    """The implementations, best first."""
    return _table(None)
