"""`nm_matmul`: the product with a weight that keeps `n` of every `m` neighbours."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcompress.arrays._nm import fill, index_bits
from jaxcompress.arrays._packing import packed_size, unpack
from jaxcompress.ops._choice import Choice, Implementation, Problem, dispatch, explained
from jaxcompress.ops._int8_matmul import int8_matmul, integer_dot
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
from jaxcompress.ops._operands import (
    MAX_K,
    check_scales,
    check_sums,
    matmul_shape,
    one_batch,
    row_scales,
    spread,
)
from jaxcompress.ops._quantized_matmul import float_dot, quantized_matmul

__all__ = ["nm_matmul", "plan", "table"]


@dataclasses.dataclass(frozen=True)
class _Static:
    n: int
    m: int
    weights: str
    dtype: str
    implementation: str | None
    bits: int = 8
    group_size: int | None = None
    scaled: bool = False


def nm_matmul(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None = None,
    *,
    n: int,
    m: int,
    x_scale: jax.Array | None = None,
    bits: int = 8,
    group_size: int | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies by a matrix of which each column keeps `n` of every `m` neighbours.

    `y[r, c] = s_x[r] sum_g s[h(g), c] sum_(i in g) x[r, m g + places[i, c]] values[i, c]`, the
    `n` kept rows `i` of each group `g`.

    Args:
      x: `[..., rows, k]`, floats, or int8 where `values` are int8; `m` divides `k`.
      values: floats or int8 codes `[k / m * n, columns]`, or with the leading dimensions
        of `x`: the kept values, group by group; or below eight bits the uint8 bit planes
        of codes along the rows.
      indices: uint8, the places in their groups, in bit planes of `ceil(log2 m)` bits
        along the rows, as `NMSparseArray` stores them. Within a group they differ.
      scale: float32 `[h, columns]`, or with the leading dimensions of `values`, for codes; `h`
        is 1, or the number of runs of `group_size`. None for 1.
      n: how many are kept.
      m: of how many.
      x_scale: a scale for each row of an int8 `x`, `[..., rows, 1]` or anything that
        broadcasts to it; None for 1.
      bits: of a code, 2 to 8.
      group_size: the neighbouring `k`, a multiple of `m`, that share a scale.
      dtype: of the result of floats, or of scaled integers; None for float32, or that of `x`
        where it is wider.
      implementation: "pallas_tpu" or "triton" (zeros put back in fast memory; of integers, no
        groups), "triton_sparse" (NVIDIA's sparse tensor cores, two of four, only by name: no
        device has run it), "reference" (zeros put back in memory), or None for the first
        that serves the shape on the platform.

    Returns:
      `[..., rows, columns]`, summed in float32. Where `x` is int8 sums are exact: int32, or
      with a `scale` or an `x_scale` what `int8_matmul` makes of the same matrix.
      Differentiable in `x` and the scales, and in `values` if they are floats.

    Raises:
      TypeError: an operand has a dtype that is not named above.
      ValueError: shapes do not match, a sum of int8 has more than 131,071 products (kept ones;
        with scales, all of a group or of `k`), or the implementation cannot run, with the reason.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jnp.arange(1.0, 257.0).reshape(64, 4)
    >>> half = jc.prune.nm(2, 4, axis=-2)
    >>> packed = jc.prune.pack({"w": w}, jc.prune.mask({"w": w}, half, 1.0), pattern=half)["w"]
    >>> y = jc.ops.nm_matmul(jnp.ones((1, 64)), packed.values, packed.indices, n=2, m=4)
    >>> y.shape, float(y[0, 0])
    ((1, 4), 4192.0)

    Mishra et al., 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378.
    """
    integers = x.dtype == jnp.int8
    if not integers and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"nm_matmul takes floats or int8; x is {x.dtype}")
    is_code = values.dtype == jnp.int8 or (values.dtype == jnp.uint8 and bits < 8)
    if not is_code and (integers or not jnp.issubdtype(values.dtype, jnp.floating)):
        kinds = "int8 values for int8 activations" if integers else "float or int8 values"
        raise TypeError(
            f"nm_matmul takes {kinds}, or packed uint8 of 2 to 7 bits; values is {values.dtype}"
        )
    if indices.dtype != jnp.uint8:
        raise TypeError(f"nm_matmul takes packed indices of uint8; indices is {indices.dtype}")
    if not 0 < n <= m:
        raise ValueError(f"expected to keep n of m, 0 < n <= m; got {n} of {m}")
    if not 2 <= bits <= 8:
        raise ValueError(f"nm_matmul takes codes of 2 to 8 bits; got bits={bits}")
    if x.ndim < 2 or values.ndim < 2 or x.shape[-1] % m:
        raise ValueError(
            f"expected x[..., rows, k] with k a multiple of {m}, and values[k / m * n, "
            f"columns]; got x{x.shape} and values{values.shape}"
        )
    kept = x.shape[-1] // m * n
    stored = packed_size(kept, index_bits(m))
    held = packed_size(kept, bits) if values.dtype == jnp.uint8 else kept
    if values.shape[-2] != held or indices.shape != (*values.shape[:-2], stored, values.shape[-1]):
        raise ValueError(
            f"{n} of {m} along {x.shape[-1]} are values[..., {held}, columns] and indices[..., "
            f"{stored}, columns]; got values{values.shape} and indices{indices.shape}"
        )
    if scale is not None and not is_code:
        raise TypeError(f"nm_matmul scales codes, not values of {values.dtype}")
    if x_scale is not None and not integers:
        raise TypeError(f"nm_matmul scales the rows of an int8 x; it is {x.dtype}")
    sums = integers and scale is None and x_scale is None
    if integers:  # scales are those of the product with zeros put back, which counts them
        check_sums(kept if sums else min(x.shape[-1], group_size or x.shape[-1]), False)
    if dtype is not None and not sums and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"nm_matmul gives floats, but of int8 without scales; got dtype={dtype}")
    if group_size is not None and (scale is None or group_size < 1 or group_size % m):
        raise ValueError(
            f"expected a scale, and a group_size that {m} divides; got {group_size} and "
            f"{'none' if scale is None else 'one'}"
        )
    check_scales({"scale": scale}, values.shape[:-2], x.shape[-1], values.shape[-1], group_size)
    unpacked = (*values.shape[:-2], x.shape[-1], values.shape[-1])
    lead, rows, k, columns = matmul_shape(x.shape, unpacked, False)
    x_scale = row_scales("x_scale", x_scale, (*lead, rows, 1))
    if values.ndim == 2:  # one product of all rows
        count = math.prod(lead) * rows
        x, values, indices = x.reshape(1, count, k), values[None], indices[None]
        scale = None if scale is None else scale[None]
        x_scale = None if x_scale is None else x_scale.reshape(1, count, 1)
    else:
        if scale is not None:
            scale = spread(scale, *values.shape[:-2], *scale.shape[-2:])
        x_scale = None if x_scale is None else one_batch(x_scale)
        x, values, indices = map(one_batch, (x, values, indices))
    kind = jnp.int32 if sums else dtype or jnp.promote_types(x.dtype, jnp.float32)
    static = _Static(
        n,
        m,
        "int8" if is_code else values.dtype.name,
        jnp.dtype(kind).name,
        implementation,
        bits if values.dtype == jnp.uint8 else 8,
        group_size if group_size is not None and group_size < k else None,
        scale is not None,
    )
    return _matmul(static, x, values, indices, scale, x_scale).reshape(*lead, rows, columns)


def plan(
    rows: int,
    k: int,
    columns: int,
    n: int,
    m: int,
    weights: str,
    dtype: str,
    platform: str,
    group_size: int | None = None,
) -> Choice:
    """The implementation that `nm_matmul` takes on `platform`."""
    group = group_size if group_size is not None and group_size < k else None
    table = _table(_Static(n, m, weights, dtype, None, group_size=group))
    return explained(table, Problem(m=rows, k=k, n=columns, dtype=dtype), platform)


def table(n: int, m: int, bits: int, group_size: int | None) -> tuple[Implementation, ...]:
    """The implementations for int8 activations and scaled codes, best first."""
    return _table(_Static(n, m, "int8", "float32", None, bits, group_size, True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, values, indices, *scales):
    problem = Problem(m=x.shape[-2], k=x.shape[-1], n=values.shape[-1], dtype=x.dtype.name)
    operands = (x, values, indices, *scales)
    return dispatch(_table(static), problem, static.implementation, *operands)


def _forward(static, *operands):
    return _matmul(static, *operands), operands


def _backward(static, operands, g):
    x, values, indices, *scales = operands
    if not jnp.issubdtype(x.dtype, jnp.floating):
        if static.dtype == "int32":  # sums of codes have no derivative
            return (None,) * len(operands)
        run = functools.partial(_reference, static, x, values, indices)
        return None, None, None, *jax.vjp(run, *scales)[1](g)
    if jnp.issubdtype(values.dtype, jnp.floating):
        by_values = lambda x, values: _reference(static, x, values, indices, *scales)
        return *jax.vjp(by_values, x, values)[1](g), None, None, None
    by_scales = lambda x, *scales: _reference(static, x, values, indices, *scales)
    dx, *dscales = jax.vjp(by_scales, x, *scales)[1](g)
    return dx, None, None, *dscales


_matmul.defvjp(_forward, _backward)


def _reference(static, x, values, indices, scale, x_scale):
    if static.bits < 8:
        values = unpack(values, static.bits, x.shape[-1] // static.m * static.n, -2)
    w = fill(values, indices, static.n, static.m, x.shape[-1], -2)
    options = dict(group_size=static.group_size, dtype=static.dtype)
    if static.dtype == "int32" and x.shape[-1] > MAX_K:  # of which zeros do not count
        return integer_dot(x, w, False)
    if x.dtype == jnp.int8:
        return int8_matmul(x, w, x_scale=x_scale, w_scale=scale, **options)
    if scale is not None:
        return quantized_matmul(x, w, scale, **options)
    return float_dot(x, w.astype(x.dtype), False).astype(static.dtype)


def _pallas_tpu(static, *operands):
    from jaxcompress.kernels.nm_matmul import pallas_tpu as kernel

    return _by_kernel(static, kernel.nm_matmul, chip("tpu"), False, *operands)


def _triton(static, *operands):
    from jaxcompress.kernels.nm_matmul import triton as kernel

    return _by_kernel(static, kernel.nm_matmul, chip("cuda") or chip("rocm"), True, *operands)


def _triton_sparse(static, x, values, indices, *scales):
    from jaxcompress.kernels.nm_matmul import triton_sparse as kernel

    run = functools.partial(kernel.nm_matmul, dtype=static.dtype, chip=chip("cuda"))
    return call_kernel(run, _LETTERS, x, values, indices, *_spread(static, x, values, *scales))


_LETTERS = ("bmk", "bsn", "bpn", "bgn", "bm1")


def _spread(static, x, values, scale, x_scale):
    """A scale for each group and column, and one for each row, where there are any."""
    if scale is not None:
        groups = -(-x.shape[-1] // static.group_size) if static.group_size else 1
        scale = jnp.broadcast_to(scale, (values.shape[0], groups, values.shape[-1]))
    return scale, x_scale


def _by_kernel(static, kernel, chip, is_cut, x, values, indices, *scales):
    run = functools.partial(
        kernel,
        pattern=(static.n, static.m),
        bits=static.bits,
        group_size=static.group_size,
        dtype=static.dtype,
        chip=chip,
    )
    scales = _spread(static, x, values, *scales)
    return call_kernel(run, _LETTERS, x, values, indices, *scales, is_cut=is_cut)


def _table(static: _Static) -> tuple[Implementation, ...]:
    floats = ("float32", "bfloat16")

    def tpu_refuses(problem: Problem, platform: str) -> str | None:
        return no_pallas_tpu(platform) or _refused(static, problem, floats)

    def gpu_refuses(problem: Problem, platform: str) -> str | None:
        return no_triton(platform) or _refused(static, problem, (*floats, "float16"))

    def defers(problem: Problem, platform: str) -> str | None:
        return small_weight(problem) or many_rows(problem, platform) or not_cut(platform)

    pattern = (static.n, static.m)
    kept = lambda p: (p.m, p.n, p.k // static.m * static.n, pattern)
    tpu_blocks = blocks_of("nm_matmul", "pallas_tpu", kept)
    gpu_blocks = blocks_of("nm_matmul", "triton", lambda p: (p.m, p.n))
    does = "kept values are loaded, zeros put back in fast memory"
    run = lambda f: functools.partial(f, static)
    return (
        Implementation("pallas_tpu", does, run(_pallas_tpu), tpu_refuses, defers, tpu_blocks),
        Implementation("triton", does, run(_triton), gpu_refuses, defers, gpu_blocks),
        Implementation(
            "triton_sparse",
            "half the products, on sparse tensor cores",
            run(_triton_sparse),
            functools.partial(_sparse_refuses, static),
            lambda problem, platform: "the kernel that puts the zeros back was faster on an H100",
        ),
        Implementation("reference", "zeros are put back, then a dense product", run(_reference)),
    )


def _sparse_refuses(static: _Static, problem: Problem, platform: str) -> str | None:
    if platform != "cuda":
        return "it is for NVIDIA's sparse tensor cores"
    if (static.n, static.m) != (2, 4):
        return f"they take two of four, not {static.n}:{static.m}"
    if static.weights != problem.dtype or problem.dtype not in ("bfloat16", "float16", "int8"):
        return f"it takes bfloat16, float16 or int8 alike, not {problem.dtype} x {static.weights}"
    if static.bits < 8:
        return "it takes values as they are, not packed"
    if static.scaled and problem.dtype != "int8":
        return "it scales integers, not floats"
    return _has_groups(static, problem) or no_triton(platform)


def _has_groups(static: _Static, problem: Problem) -> str | None:
    if problem.dtype != "int8" or static.group_size is None:
        return None
    return f"it scales whole columns of integers, not groups of {static.group_size}"


def _refused(static: _Static, problem: Problem, kinds: tuple[str, ...]) -> str | None:
    for size, most in ((static.n, 4), (static.m, 16)):
        if size > most or size & (size - 1):
            return f"its patterns are powers of two, up to 4 of 16, not {static.n}:{static.m}"
    shared = static.group_size // static.m * static.n if static.group_size else None
    if shared and (shared < 16 or shared & (shared - 1)):
        return f"a scale is for a power of two of kept rows, 16 or more, not {shared}"
    for kind in (problem.dtype, static.weights):
        if kind not in (*kinds, "int8"):
            return f"it takes {', '.join(kinds)} and int8, not {kind}"
    if static.dtype not in (*kinds, "int8", "int32"):
        return f"it gives {', '.join(kinds)}, not {static.dtype}"
    return _has_groups(static, problem)
