"""What every backend of `quantized_matmul` has to do; a backend inherits it."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles

EXAMPLES = int(os.environ.get("KERNEL_EXAMPLES", "5"))  # an interpreter takes a second
SIZES = [1, 7, 16, 63, 64, 65, 127, 128, 129, 1000]
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # one rounding


def problem(m, k, n, *, bits, group_size, zero, transpose_w=False, dtype="float32", b=1, seed=0):
    """The arguments, and the activations and the decoded weight in float64.

    The bytes of a packed weight are random, those behind the last code too.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(b, m, k)).astype(jnp.dtype(dtype))
    if bits == 8:
        w = codes = rng.integers(-128, 128, (b, k, n)).astype(np.int8)
    else:
        w = rng.integers(0, 256, (b, -(-k // 64) * 8 * bits, n)).astype(np.uint8)
        codes = oracles.unpack(w, bits, k, 1)
    groups = -(-k // group_size) if group_size and group_size < k else 1
    scale = rng.uniform(0.5, 2, (b, groups, n)).astype(np.float32)
    zeros = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), scale.shape).astype(np.int8)
    group = np.arange(k) // (group_size if groups > 1 else k)
    decoded = codes - (zeros[:, group].astype(np.int64) if zero else 0)
    decoded = decoded * scale[:, group].astype(np.float64)
    if transpose_w:
        w = np.ascontiguousarray(np.swapaxes(w, 1, 2))
    return (x, w, scale, zeros if zero else None), np.asarray(x, np.float64), decoded


def check(got, x, decoded, dtype, grouped):
    want, size = x @ decoded, np.abs(x) @ np.abs(decoded)
    # Float32 sums of k products. A weight with groups is rounded to the dtype of x before,
    # the result after.
    bound = ((x.shape[-1] + 8) * EPS["float32"] + (EPS[dtype] if grouped else 0)) * size
    bound += EPS[dtype] * np.abs(want)
    assert str(got.dtype) == dtype
    assert got.shape == want.shape
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound)


class QuantizedMatmulSuite:
    """`run(*arrays, **options)` calls the kernel; `block(m, n, k)` makes small blocks."""

    dtypes = ("float32", "bfloat16", "float16")

    def run(self, *arrays, **options):
        raise NotImplementedError

    def block(self, m, n, k):
        raise NotImplementedError

    @settings(max_examples=EXAMPLES)
    @given(
        m=st.sampled_from(SIZES),
        k=st.sampled_from(SIZES),
        n=st.sampled_from(SIZES),
        bits=st.integers(2, 8),
        group_size=st.sampled_from([None, 32, 64, 128]),
        zero=st.booleans(),
        dtype=st.sampled_from(sorted(EPS)),
        seed=st.integers(0, 99),
    )
    def test_the_formula(self, m, k, n, bits, group_size, zero, dtype, seed):
        dtype = dtype if dtype in self.dtypes else "float32"
        arrays, x, decoded = problem(
            m, k, n, bits=bits, group_size=group_size, zero=zero, dtype=dtype, seed=seed
        )
        options = dict(bits=bits, group_size=group_size, block=self.block(m, n, k))
        got = self.run(*arrays, **options)
        check(got, x, decoded, dtype, group_size is not None and group_size < k)

    @pytest.mark.parametrize(
        ("bits", "group_size"),
        [(2, 32), (3, 32), (4, 32), (4, None), (5, 128), (6, 64), (7, 32), (8, 128)],
    )
    def test_every_width_in_blocks_by_the_table(self, bits, group_size):
        arrays, x, decoded = problem(
            7, 320, 65, bits=bits, group_size=group_size, zero=True, dtype="bfloat16", b=2
        )
        got = self.run(*arrays, bits=bits, group_size=group_size)
        check(got, x, decoded, "bfloat16", group_size is not None)

    def test_a_group_longer_than_a_block(self):
        arrays, x, decoded = problem(16, 1000, 64, bits=4, group_size=512, zero=True)
        got = self.run(*arrays, bits=4, group_size=512, block=self.block(16, 64, 1000))
        check(got, x, decoded, "float32", True)

    @pytest.mark.parametrize("group_size", [None, 32])
    def test_int8_output_first(self, group_size):
        arrays, x, decoded = problem(
            65, 129, 63, bits=8, group_size=group_size, zero=True, transpose_w=True
        )
        got = self.run(*arrays, group_size=group_size, transpose_w=True)
        check(got, x, decoded, "float32", group_size is not None)

    @pytest.mark.parametrize("shape", [(0, 64, 5), (2, 0, 5), (2, 64, 0)])
    def test_nothing_in_gives_zeros_or_nothing(self, shape):
        m, k, n = shape
        x, w = np.ones((1, m, k), np.float32), np.zeros((1, k // 2, n), np.uint8)
        got = self.run(x, w, np.ones((1, 1, n), np.float32), bits=4)
        np.testing.assert_array_equal(got, np.zeros((1, m, n)))

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_every_code_and_the_lowest_zero_point(self, bits):
        """One row of x picks one code: all of them, -2^(b-1) too, less the lowest there is."""
        low = -(2 ** (bits - 1))
        codes = np.arange(low, -low).astype(np.int8)
        k = len(codes)
        w = codes[None, :, None] if bits == 8 else oracles.pack(codes, bits, 0)[None, :, None]
        zero = np.full((1, 1, 1), low, np.int8)
        x = np.eye(k, dtype=np.float32)[None]
        got = self.run(x, w, np.ones((1, 1, 1), np.float32), zero, bits=bits)
        np.testing.assert_array_equal(got[0, :, 0], np.arange(k))

    def test_the_result_has_the_dtype_that_is_asked_for(self):
        arrays, x, decoded = problem(7, 64, 7, bits=4, group_size=None, zero=False)
        got = self.run(*arrays, bits=4, dtype="bfloat16")
        check(got, x, decoded, "bfloat16", False)
