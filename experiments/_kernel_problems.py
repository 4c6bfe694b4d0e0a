"""Products for the kernels of devices: arguments, the right answers, and how far off one may be.

The weights are made as the library stores them and decoded here in float64.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc

EPS = 2.0**-24
LOW = 2.0**-8  # one rounding to bfloat16


class Problem(NamedTuple):
    """`run(*args, implementation=)` gives arrays, each within its bound of what is wanted."""

    run: Callable[..., Any]
    args: list[Any]
    want: list[np.ndarray]
    bound: list[np.ndarray]
    also: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # other kernels of a backend
    trains: bool = False

    def is_right(self, got: Any) -> bool:
        """Whether every number of every result is within its bound."""
        pairs = zip(jax.tree.leaves(got), self.want, self.bound)
        return all(np.all(np.abs(np.asarray(g, np.float64) - w) <= b) for g, w, b in pairs)

    def dense(self) -> tuple[Callable[..., Any], list[Any]]:
        """The product that this one replaces, in bfloat16, and its arguments."""
        rng, (m, k) = np.random.default_rng(1), self.args[0].shape
        n = self.args[-1].shape[-1] if self.trains else self.want[0].shape[-1]
        x, w, g = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((m, k), (k, n), (m, n)))
        if self.trains:
            return lambda x, w, g: jax.vjp(jnp.matmul, x, w)[1](g), [x, w, g]
        return jnp.matmul, [x, w]


def int8(m: int, k: int, n: int) -> Problem:
    """int8 x int8, exact."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((m, k), (k, n)))
    # Whole numbers below 2^53: the float64 product is exact, and much faster than int64's.
    want = x.astype(np.float64) @ w.astype(np.float64)
    return Problem(jc.ops.int8_matmul, [x, w], [want], [np.zeros_like(want)])


def int8_then(m: int, k: int, n: int, activation: str | None = "gelu") -> Problem:
    """The same with scales, a bias and an activation behind it, as int8 codes."""
    rng = np.random.default_rng(0)
    _, (x, w), [sums], *_ = int8(m, k, n)
    scales = [rng.uniform(0.5, 1, s).astype(np.float32) / k for s in ((m, 1), (1, n))]
    bias = rng.normal(size=(1, n)).astype(np.float32)
    out_scale = np.full((1, 1), 0.02, np.float32)

    def run(x: Any, w: Any, x_scale: Any, w_scale: Any, bias: Any, out_scale: Any, **how: Any):
        then = dict(bias=bias, activation=activation, out_scale=out_scale)
        return jc.ops.int8_matmul(x, w, x_scale=x_scale, w_scale=w_scale, **then, **how)

    sums = sums * scales[0].astype(np.float64) * scales[1].astype(np.float64)
    want = sums + bias
    if activation == "gelu":
        want = want / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (want + 0.044715 * want**3)))
    # A rounding each of the steps that follow a sum; then half of a code.
    error = 16 * EPS * (np.abs(sums) + np.abs(bias) + 1) / out_scale
    want = np.clip(want / out_scale, -127, 127)
    return Problem(run, [x, w, *scales, bias, out_scale], [want], [0.5 + error])


def weight(m: int, k: int, n: int, bits: int, group_size: int, integers: bool = False) -> Problem:
    """A weight of few bits with scales by groups; activations bfloat16, or int8 (w4a8)."""
    rng = np.random.default_rng(0)
    if integers:
        x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    else:
        x = rng.normal(size=(m, k)).astype(jnp.bfloat16)
    low = -(2 ** (bits - 1))
    codes = rng.integers(low, -low, (k, n)).astype(np.int8)
    groups = -(-k // group_size)
    scale = rng.uniform(0.5, 2, (groups, n)).astype(np.float32)
    decoded = codes * np.repeat(scale.astype(np.float64), group_size, 0)[:k]
    w = codes if bits == 8 else jc.arrays._packing.pack(jnp.asarray(codes), bits, 0)
    exact = x.astype(np.float64)
    want, total = exact @ decoded, np.abs(exact) @ np.abs(decoded)
    if integers:  # exact within a group, float32 from there on
        op = functools.partial(jc.ops.w4a8_matmul, group_size=group_size)
        return Problem(op, [x, w, scale], [want], [(groups + 4) * EPS * total])
    op = functools.partial(jc.ops.quantized_matmul, bits=bits, group_size=group_size)
    # Float32 sums; the decoded weight and the result are rounded to bfloat16.
    return Problem(op, [x, w, scale], [want], [(k * EPS + LOW) * total + LOW * np.abs(want)])


def two_of_four(m: int, k: int, n: int, integers: bool = False) -> Problem:
    """Two of every four neighbours are kept, in bfloat16 or as int8; activations bfloat16."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(m, k)).astype(jnp.bfloat16)
    places = np.sort(np.argsort(rng.random((k // 4, 4, n)), 1)[:, :2], 1)
    if integers:
        values = rng.integers(-127, 128, places.shape).astype(np.int8)
    else:
        values = rng.normal(size=places.shape).astype(jnp.bfloat16)
    w = np.zeros((k // 4, 4, n))
    np.put_along_axis(w, places, values.astype(np.float64), 1)
    indices = jc.arrays._packing.pack(jnp.asarray(places.reshape(-1, n).astype(np.int8)), 2, 0)
    op = functools.partial(jc.ops.nm_matmul, n=2, m=4, dtype=jnp.bfloat16)
    want, bound = _of_floats(x, w.reshape(k, n))
    also = {} if integers else {"triton": ("triton_sparse",)}
    return Problem(op, [x, values.reshape(-1, n), indices], [want], [bound], also)


def blocks(m: int, k: int, n: int, side: int = 128, trains: bool = False) -> Problem:
    """A quarter of the blocks is kept, in uneven columns; or the gradients of that product."""
    rng = np.random.default_rng(0)
    down, across = k // side, n // side
    slots = max(1, down // 2)
    counts = rng.integers(0, slots + 1, across).astype(np.int32)
    rows = np.argsort(rng.random((across, down)), 1)[:, :slots].astype(np.int32)
    is_used = np.arange(slots) < counts[:, None]
    kept = rng.normal(size=(across, slots, side, side)) * is_used[..., None, None]
    kept = kept.astype(jnp.bfloat16)
    x = rng.normal(size=(m, k)).astype(jnp.bfloat16)
    w = np.zeros((across, down, side, side))
    for column, slot in np.argwhere(is_used):
        w[column, rows[column, slot]] = kept[column, slot]
    w = w.transpose(1, 2, 0, 3).reshape(k, n)

    def run(x: Any, kept: Any, rows: Any, counts: Any, **how: Any) -> Any:
        options = dict(columns=n, counts=counts, dtype=jnp.bfloat16, **how)
        return jc.ops.block_sparse_matmul(x, kept, rows, **options)

    args = [x, kept, rows, counts]
    if not trains:
        want, bound = _of_floats(x, w)
        return Problem(run, args, [want], [bound])
    g = rng.normal(size=(m, n)).astype(jnp.bfloat16)

    def gradients(x: Any, kept: Any, rows: Any, counts: Any, g: Any, **how: Any) -> Any:
        return jax.vjp(lambda x, kept: run(x, kept, rows, counts, **how), x, kept)[1](g)

    dx, dx_bound = _of_floats(g, w.T)
    parts = []
    for part in _of_floats(x.T, g):
        cut = part.reshape(down, side, across, side).transpose(2, 0, 1, 3)
        cut = np.take_along_axis(cut, rows[..., None, None], 1)
        parts.append(cut * is_used[..., None, None])
    return Problem(gradients, [*args, g], [dx, parts[0]], [dx_bound, parts[1]], trains=True)


def _of_floats(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product, and how far a float32 sum of it that is rounded to bfloat16 may be off."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    want = x @ w
    return want, (x.shape[-1] + 8) * EPS * (np.abs(x) @ np.abs(w)) + LOW * np.abs(want)
