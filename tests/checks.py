"""What many tests ask: are the sums right to float32, and does `explain` agree?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
import oracles
from jaxcompress.arrays import IntType, QuantizedArray
from jaxcompress.kernels import cpu

# What the CPU takes first: a machine without a compiler has no native kernels.
ON_CPU = "xla" if cpu.missing() else "cpu"

EPS = 2.0**-24  # half the spacing of float32: the largest relative error of one rounding

SPECS = {
    "int8": jc.quantize.int8,
    "int4": functools.partial(jc.quantize.int4, group_size=16),
    "w8a8": jc.quantize.w8a8,
}
OPS = {"int8": "quantized_matmul", "int4": "quantized_matmul", "w8a8": "int8_matmul"}


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def quantized(w, spec, **kwargs):
    """One array, quantized under the path "w"."""
    return jc.quantize.quantize({"w": jax.numpy.asarray(w)}, {"w": spec}, **kwargs)["w"]


def made(shape, axis=(-2,), sizes=None, bits=8, symmetric=True, *, seed=0, path="w"):
    """A `QuantizedArray` of random codes, put together without a line of the library's code."""
    rng, qtype = np.random.default_rng(seed), IntType(bits, symmetric)
    scales = list(shape)
    for i, a in enumerate(axis):
        scales[a] = -(-shape[a] // sizes[i]) if sizes else 1
    codes = rng.integers(qtype.low, qtype.high + 1, shape).astype(np.int8)
    zero = None
    if not symmetric:
        zero = rng.integers(qtype.low, qtype.high + 1, scales).astype(np.int8)
    packed = shape[axis[-1]] if axis and bits < 8 else None
    return QuantizedArray(
        codes if packed is None else oracles.pack(codes, bits, axis[-1]),
        rng.uniform(0.5, 2, scales).astype(np.float32),
        zero,
        qtype=qtype,
        axis=tuple(axis),
        group_size=sizes,
        packed=packed,
        path=path,
    )


def seen(x, q, contract=-1):
    """The activations that `q` is multiplied with: quantized ones if it asks for them.

    `contract` names the axes of `x` that the product contracts; a token is an index of
    the others.
    """
    if q.act is None:
        return np.asarray(x, np.float64)
    axis = contract if q.act.per_token else None
    return oracles.activations(x, q.act.qtype.bits, axis=axis, scale=q.act_scale)


def assert_sums(got, want, size, terms):
    """`got` is a float32 sum of `terms` products: a rounding each, and one a scale.

    `size` is the sum of the magnitudes of the products, elementwise.
    """
    got = np.asarray(got, np.float64)
    assert got.shape == np.shape(want)
    bound = (terms + 8) * EPS * np.asarray(size) + np.finfo(np.float32).tiny
    worst = np.max(np.abs(got - want) / bound, initial=0.0)
    assert worst <= 1, f"the error is {worst:.3g} times what float32 sums explain"


def assert_einsum(got, equation, x, q, contract=-1):
    """`got` is `einsum(equation, x, q)`, where `q` is a quantized array."""
    x, w = seen(x, q, contract), oracles.dense(q)
    contracted = (contract,) if isinstance(contract, int) else contract
    terms = np.prod([x.shape[a] for a in contracted])
    want = np.einsum(equation, x, w)
    assert_sums(got, want, np.einsum(equation, np.abs(x), np.abs(w)), terms)


def through(statistic, batches):
    """The value of a statistic of `[m, k]` batches, by its triple."""
    zeros = jnp.zeros(statistic.shape(batches[0].shape[-1]))
    state, ones = statistic.init(zeros), jnp.ones(())
    for batch in batches:
        state = jax.jit(statistic.join)(state, statistic.of(jnp.asarray(batch)), ones)
    return np.asarray(jax.jit(statistic.finalize)(state))


def run(fn, params, *args):
    """The result under `jit`, and the rows of `explain`."""
    return jax.jit(jc.accelerate(fn))(params, *args), jc.explain(fn, params, *args)


def assert_compressed(rows, *ops):
    """Nothing was decoded, and these are the ops that took the weights, in any order."""
    assert not rows.materialised, f"\n{rows.materialised}"
    assert sorted(row.op for row in rows) == sorted(ops), f"\n{rows}"


def decoded(params):
    """`params` in numpy float64, every quantized array by what it stands for."""
    return jax.tree.map(
        lambda leaf: (
            oracles.dense(leaf)
            if isinstance(leaf, QuantizedArray)
            else np.asarray(leaf, np.float64)
        ),
        params,
        is_leaf=jc.arrays.is_compressed,
    )


def assert_model(got, want, steps=32):
    """`got` is a few float32 layers: `steps` roundings of the largest number of `want`."""
    got = np.asarray(got, np.float64)
    assert got.shape == np.shape(want)
    worst = np.max(np.abs(got - want)) / np.max(np.abs(want))
    assert worst <= steps * EPS, f"the relative error is {worst:.3g}"


def assert_valid(q):
    """The documented invariants of a `QuantizedArray`."""
    assert isinstance(q, QuantizedArray)
    assert all(-q.ndim <= a < 0 for a in q.axis)
    assert len(set(q.axis)) == len(q.axis)
    assert q.group_size is None or len(q.group_size) == len(q.axis)
    expected = list(q.shape)
    for i, a in enumerate(q.axis):
        expected[a] = -(-q.shape[a] // q.group_size[i]) if q.group_size else 1
    assert q.scale.shape == tuple(expected)
    assert q.zero_point is None or q.zero_point.shape == q.scale.shape
    stored = list(q.shape)
    if q.packed is not None:
        stored[q.axis[-1]] = -(-q.packed // 64) * 8 * q.qtype.bits
    assert q.values.shape == tuple(stored)
