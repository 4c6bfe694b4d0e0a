"""int8 x int8 -> int32 by the native library, exact, for CPUs."""

import functools

import jax

from jaxcompress.kernels import cpu
from jaxcompress.kernels.cpu.call import COLUMN_MAJOR, ROW_MAJOR, DenseCall, native_matmul
from jaxcompress.kernels.int8_matmul import xla

__all__ = ["int8_matmul"]


def int8_matmul(x: jax.Array, w: jax.Array, *, transpose_w: bool = False) -> jax.Array:
    """`x @ w` for int8 `x[..., m, k]` and `w[..., k, n]`, as int32, modulo 2^32.

    With `transpose_w`, `w[..., n, k]`. Leading dimensions are batch dimensions.
    """
    layout = COLUMN_MAJOR if transpose_w else ROW_MAJOR
    call = DenseCall(integers=True, layout=layout, path=cpu.path())
    flat = (a.reshape(-1, *a.shape[-2:]) if a.ndim != 3 else a for a in (x, w))
    out = native_matmul(call, _by_xla(transpose_w), *flat)
    return out.reshape(*x.shape[:-1], out.shape[-1])


@functools.cache
def _by_xla(transpose_w: bool) -> functools.partial:
    return functools.partial(xla.int8_matmul, transpose_w=transpose_w)
