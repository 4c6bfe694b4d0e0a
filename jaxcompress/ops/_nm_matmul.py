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
from jaxcompress.ops._int8_matmul import check_scales, check_sums, integer_dot, matmul_shape
from jaxcompress.ops._kernels import (
    blocks_of,
    call_kernel,
    chip,
    no_pallas_tpu,
    no_triton,
    not_cut,
)
from jaxcompress.ops._quantized_matmul import float_dot, quantized_matmul

__all__ = ["nm_matmul", "plan"]


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
    bits: int = 8,
    group_size: int | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies by a matrix of which each column keeps `n` of every `m` neighbours.

    `y[:, c] = sum_g s[h(g), c] sum_(i < n) x[:, m g + places[n g + i, c]] values[n g + i, c]`

    Args:
      x: `[..., rows, k]`, floats, or int8 where `values` are int8; `m` divides `k`.
      values: floats or int8 codes `[k / m * n, columns]`, or with the leading dimensions
        of `x`: the kept values, group by group; or below eight bits the uint8 bit planes
        of codes along the rows.
      indices: uint8, the places in their groups, in bit planes of `ceil(log2 m)` bits
        along the rows, as `NMSparseArray` stores them. Within a group they differ.
      scale: float32 `[h, columns]`, or with the leading dimensions of `values`, for codes and
        a float `x`; `h` is 1, or the number of runs of `group_size`. None for 1.
      n: how many are kept.
      m: of how many.
      bits: of a code, 2 to 8.
      group_size: the neighbouring `k`, a multiple of `m`, that share a scale.
      dtype: of the result where `x` is of floats; None for float32, or that of `x` where it
        is wider.
      implementation: "pallas_tpu" or "triton" (zeros put back in fast memory),
        "triton_sparse" (NVIDIA's sparse tensor cores, two of four, only by name: no device
        has run it), "reference" (zeros put back in memory), or None for the first that
        serves the shape on the platform.

    Returns:
      `[..., rows, columns]`, summed in float32; exact int32 where `x` is int8.
      Differentiable in `x` and `scale`, and in `values` if they are floats.

    Raises:
      TypeError: an operand has a dtype that is not named above.
      ValueError: shapes do not match, or the implementation cannot run, with the reason.

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
    if integers:
        check_sums(kept, False)
    if scale is not None and (integers or not is_code):
        what = "int8 activations" if integers else f"values of {values.dtype}"
        raise TypeError(f"nm_matmul scales codes that meet floats, not {what}")
    if group_size is not None and (scale is None or group_size < 1 or group_size % m):
        raise ValueError(
            f"expected a scale, and a group_size that {m} divides; got {group_size} and "
            f"{'none' if scale is None else 'one'}"
        )
    check_scales({"scale": scale}, values.shape[:-2], x.shape[-1], values.shape[-1], group_size)
    unpacked = (*values.shape[:-2], x.shape[-1], values.shape[-1])
    lead, rows, k, columns = matmul_shape(x.shape, unpacked, False)
    if values.ndim == 2:  # one product of all rows
        x, values, indices = x.reshape(1, math.prod(lead) * rows, k), values[None], indices[None]
        scale = None if scale is None else scale[None]
    else:
        flat = lambda a: a.reshape(math.prod(a.shape[:-2]), *a.shape[-2:])
        if scale is not None:
            scale = flat(jnp.broadcast_to(scale, (*values.shape[:-2], *scale.shape[-2:])))
        x, values, indices = map(flat, (x, values, indices))
    kind = jnp.int32 if integers else dtype or jnp.promote_types(x.dtype, jnp.float32)
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
    return _matmul(static, x, values, indices, scale).reshape(*lead, rows, columns)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, values, indices, scale):
    problem = Problem(m=x.shape[-2], k=x.shape[-1], n=values.shape[-1], dtype=x.dtype.name)
    return dispatch(_table(static), problem, static.implementation, x, values, indices, scale)


def _forward(static, *operands):
    return _matmul(static, *operands), operands


def _backward(static, operands, g):
    x, values, indices, scale = operands
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None, None, None, None
    if jnp.issubdtype(values.dtype, jnp.floating):
        run = lambda x, values: _reference(static, x, values, indices, None)
        return *jax.vjp(run, x, values)[1](g), None, None
    run = lambda x, scale: _reference(static, x, values, indices, scale)
    dx, dscale = jax.vjp(run, x, scale)[1](g)
    return dx, None, None, dscale


_matmul.defvjp(_forward, _backward)


def _reference(static, x, values, indices, scale):
    if static.bits < 8:
        values = unpack(values, static.bits, x.shape[-1] // static.m * static.n, -2)
    w = fill(values, indices, static.n, static.m, x.shape[-1], -2)
    if x.dtype == jnp.int8:
        return integer_dot(x, w, False)
    if scale is not None:
        options = dict(group_size=static.group_size, dtype=static.dtype)
        return quantized_matmul(x, w, scale, **options)
    return float_dot(x, w.astype(x.dtype), False).astype(static.dtype)


def _pallas_tpu(static, *operands):
    from jaxcompress.kernels.nm_matmul import pallas_tpu as kernel

    return _by_kernel(static, kernel.nm_matmul, chip("tpu"), False, *operands)


def _triton(static, *operands):
    from jaxcompress.kernels.nm_matmul import triton as kernel

    return _by_kernel(static, kernel.nm_matmul, chip("cuda") or chip("rocm"), True, *operands)


def _triton_sparse(static, x, values, indices, scale):
    from jaxcompress.kernels.nm_matmul import triton_sparse as kernel

    run = functools.partial(kernel.nm_matmul, dtype=static.dtype, chip=chip("cuda"))
    return call_kernel(run, ("bmk", "bsn", "bpn"), x, values, indices)


def _by_kernel(static, kernel, chip, is_cut, x, values, indices, scale):
    run = functools.partial(
        kernel,
        pattern=(static.n, static.m),
        bits=static.bits,
        group_size=static.group_size,
        dtype=static.dtype,
        chip=chip,
    )
    if scale is not None:
        groups = -(-x.shape[-1] // static.group_size) if static.group_size else 1
        scale = jnp.broadcast_to(scale, (values.shape[0], groups, values.shape[-1]))
    letters = ("bmk", "bsn", "bpn", "bgn")
    return call_kernel(run, letters, x, values, indices, scale, is_cut=is_cut)


def _table(static: _Static) -> tuple[Implementation, ...]:
    floats = ("float32", "bfloat16")

    def tpu_refuses(problem: Problem, platform: str) -> str | None:
        return no_pallas_tpu(platform) or _refused(static, problem, floats)

    def gpu_refuses(problem: Problem, platform: str) -> str | None:
        return no_triton(platform) or _refused(static, problem, (*floats, "float16"))

    def defers(problem: Problem, platform: str) -> str | None:
        if problem.k < 256 or problem.n < 128:
            return f"{problem.k} x {problem.n} weights are less than one block of 256 x 128"
        return not_cut(platform)

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
            lambda problem, platform: "no device has run it",
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
    if static.bits < 8 or static.scaled:
        return "it takes values as they are, neither packed nor scaled"
    return no_triton(platform)


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
    return None
