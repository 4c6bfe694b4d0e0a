"""What every backend of `nm_matmul` has to do; a backend inherits it and says how to run."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles

EXAMPLES = int(os.environ.get("KERNEL_EXAMPLES", "6")) // 2  # one takes seconds
SIZES = [1, 7, 16, 63, 64, 65, 127, 128, 129, 1000]
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # one rounding
PATTERNS = [(2, 4), (1, 2), (1, 4), (2, 8), (4, 8), (1, 16), (4, 16)]


def numbers(rng, shape, dtype):
    if dtype == "int8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.normal(size=shape).astype(jnp.dtype(dtype))


def problem(m, groups, columns, *, pattern=(2, 4), dtype="float32", weights=None, b=1, seed=0):
    """The arguments, and x and the weight in float64.

    Places of a group differ and come in any order; the bits behind the last are ones.
    """
    rng, (n, of) = np.random.default_rng(seed), pattern
    x = numbers(rng, (b, m, groups * of), dtype)
    values = numbers(rng, (b, groups, n, columns), weights or dtype)
    places = np.argsort(rng.random((b, groups, of, columns)), 2)[:, :, :n].astype(np.int8)
    w = np.zeros((b, groups, of, columns))
    np.put_along_axis(w, places.astype(np.int64), values.astype(np.float64), 2)
    bits = max(1, (of - 1).bit_length())
    stored = places.reshape(b, groups * n, columns)
    behind = -stored.shape[1] % 64
    stored = np.concatenate([stored, np.full((b, behind, columns), of - 1, np.int8)], 1)
    indices = np.stack([oracles.pack(one, bits, 0) for one in stored])
    arrays = (x, values.reshape(b, groups * n, columns), indices)
    return arrays, x.astype(np.float64), w.reshape(b, groups * of, columns)


def integers(
    m, groups, columns, *, pattern=(2, 4), bits=8, group_size=None, dtype="float32", seed=0
):
    """As `problem`, with values of few bits and scales; the weight is what they decode to.

    All bytes of packed values are random, those behind the last code too.
    """
    (x, values, indices), wide, w = problem(
        m, groups, columns, pattern=pattern, dtype=dtype, weights="int8", seed=seed
    )
    rng, k = np.random.default_rng(seed), groups * pattern[1]
    if bits < 8:
        low = 1 << (bits - 1)
        at = w != 0
        codes = (values.astype(np.int64) & (2 * low - 1) ^ low) - low  # the low bits, signed
        w[at] = ((w[at].astype(np.int64) & (2 * low - 1)) ^ low) - low
        behind = rng.integers(-low, low, (1, -codes.shape[1] % 64, columns))
        values = oracles.pack(np.concatenate([codes, behind], 1)[0].astype(np.int8), bits, 0)[None]
    count = -(-k // group_size) if group_size and group_size < k else 1
    scale = rng.uniform(0.5, 2, (1, count, columns)).astype(np.float32)
    w = w * scale.astype(np.float64)[:, np.arange(k) // (group_size if count > 1 else max(k, 1))]
    return (x, values, indices, scale), wide, w


def check(got, x, w, dtype, decoded="float32"):
    want = x @ w
    if dtype == "int8":
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)
        return
    # Float32 sums of k products, of which all but n in m are zeros, of a weight that is
    # rounded to `decoded`; the result is rounded.
    error = (x.shape[2] + 8) * EPS["float32"] + EPS[decoded]
    bound = error * (np.abs(x) @ np.abs(w)) + EPS[dtype] * np.abs(want)
    assert str(got.dtype) == dtype
    assert got.shape == want.shape
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound)


def check_scaled(got, sums, scales, dtype):
    """Exact sums up to 2^24 are floats; two scales and the cast are a rounding each."""
    want = sums.astype(np.float64)
    for scale in scales:
        want = want if scale is None else want * scale.astype(np.float64)
    assert str(got.dtype) == dtype
    bound = (4 * EPS["float32"] + EPS[dtype]) * np.abs(want)
    bound += 2.0**-25 if dtype == "float16" else 0  # below its normal range
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound)


PROBLEMS = dict(
    m=st.sampled_from(SIZES),
    groups=st.sampled_from(SIZES[:-1] + [250]),
    columns=st.sampled_from(SIZES[:-1]),
    pattern=st.sampled_from(PATTERNS),
)


class NMMatmulSuite:
    """`run(*arrays, **options)` calls the kernel; `block(m, n)` makes small blocks."""

    dtypes = ("float32", "bfloat16", "float16", "int8")

    def run(self, *arrays, **options):
        raise NotImplementedError

    def block(self, m, n):
        return None  # by the table

    @settings(max_examples=EXAMPLES)
    @given(
        **PROBLEMS,
        dtype=st.integers(0, 3),
        integers=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_the_product(self, m, groups, columns, pattern, dtype, integers, seed):
        dtype = self.dtypes[dtype % len(self.dtypes)]
        weights = "int8" if integers else None
        arrays, x, w = problem(
            m, groups, columns, pattern=pattern, dtype=dtype, weights=weights, seed=seed
        )
        options = {} if dtype == "int8" else dict(dtype=dtype)
        got = self.run(*arrays, pattern=pattern, block=self.block(m, columns), **options)
        check(got, x, w, dtype)

    @settings(max_examples=max(2, EXAMPLES // 2))
    @given(
        **PROBLEMS,
        bits=st.sampled_from([8, 4, 3, 2]),
        shared=st.sampled_from([None, 16, 32, 128]),
        dtype=st.integers(0, 2),
        seed=st.integers(0, 99),
    )
    def test_integers_with_scales(self, m, groups, columns, pattern, bits, shared, dtype, seed):
        """`shared` of the kept rows have a scale."""
        floats = [d for d in self.dtypes if d != "int8"]
        dtype = floats[dtype % len(floats)]
        group_size = shared and shared // pattern[0] * pattern[1]
        options = dict(pattern=pattern, bits=bits, group_size=group_size)
        arrays, x, w = integers(m, groups, columns, dtype=dtype, seed=seed, **options)
        got = self.run(*arrays, dtype=dtype, block=self.block(m, columns), **options)
        check(got, x, w, dtype, dtype)

    def test_whole_numbers_of_many_bit_planes_are_exact(self):
        """By the table: planes of 4, 2 and 1 bits, and of 2 and 1."""
        for bits in (7, 3):
            (x, *arrays, scale), _, w = integers(5, 128, 20, bits=bits)
            x = np.round(x * 4)
            got = self.run(x, *arrays, np.ones_like(scale), pattern=(2, 4), bits=bits)
            np.testing.assert_array_equal(got, x.astype(np.float64) @ np.round(w / scale))

    @settings(max_examples=max(2, EXAMPLES // 2))
    @given(
        **PROBLEMS,
        bits=st.sampled_from([8, 4, 3]),
        sides=st.sampled_from(["x", "w", "xw"]),
        dtype=st.integers(0, 2),
        seed=st.integers(0, 99),
    )
    def test_scaled_integers(self, m, groups, columns, pattern, bits, sides, dtype, seed):
        """Scales of rows and of columns, after sums that are exact."""
        floats = [d for d in self.dtypes if d != "int8"]
        dtype = floats[dtype % len(floats)]
        (*arrays, scale), x, w = integers(
            m, groups, columns, pattern=pattern, bits=bits, dtype="int8", seed=seed
        )
        x_scale = np.random.default_rng(seed).uniform(0.01, 0.1, (1, m, 1)).astype(np.float32)
        scales = scale if "w" in sides else None, x_scale if "x" in sides else None
        options = dict(pattern=pattern, bits=bits, block=self.block(m, columns))
        got = self.run(*arrays, *scales, dtype=dtype, **options)
        codes = np.round(w / scale.astype(np.float64))
        check_scaled(got, x.astype(np.int64) @ codes.astype(np.int64), scales, dtype)

    def test_packed_integers_times_integers(self):
        (x, *arrays, scale), _, w = integers(5, 100, 20, bits=4, dtype="int8")
        got = self.run(x, *arrays, pattern=(2, 4), bits=4)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(
            got, x.astype(np.int64) @ np.round(w / scale).astype(np.int64)
        )

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_every_pattern(self, pattern):
        arrays, x, w = problem(3, 40, 20, pattern=pattern, b=2)
        check(self.run(*arrays, pattern=pattern), x, w, "float32")

    def test_two_of_four_in_several_blocks(self):
        """1000 rows of x, and 4 x 300 of the weight, by the table."""
        arrays, x, w = problem(129, 300, 200, dtype="bfloat16")
        check(self.run(*arrays, pattern=(2, 4), dtype="bfloat16"), x, w, "bfloat16")

    @pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
    def test_nothing_in_gives_zeros_or_nothing(self, shape):
        m, groups, columns = shape
        values = np.ones((1, 2 * groups, columns), np.float32)
        indices = np.zeros((1, 16 * bool(groups), columns), np.uint8)
        x = np.ones((1, m, 4 * groups), np.float32)
        got = self.run(x, values, indices, pattern=(2, 4))
        np.testing.assert_array_equal(got, np.zeros((1, m, columns)))


class SparseTensorCoresSuite:
    """What has to hold of two of four by `mma.sp`; `run(*arrays, **options)` calls the kernel."""

    def run(self, *arrays, **options):
        raise NotImplementedError

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (9, 20, 66), (65, 250, 129)])
    def test_places_come_in_any_order_and_the_instruction_wants_them_to_ascend(self, dtype, shape):
        arrays, x, w = problem(*shape, dtype=dtype)
        options = {} if dtype == "int8" else dict(dtype=dtype)
        check(self.run(*arrays, **options), x, w, dtype)

    @pytest.mark.parametrize("sides", ["x", "w", "xw"])
    def test_scales_of_integers(self, sides):
        (*arrays, scale), x, w = integers(9, 20, 66, dtype="int8")
        x_scale = np.linspace(0.01, 0.1, 9, dtype=np.float32)[None, :, None]
        scales = scale if "w" in sides else None, x_scale if "x" in sides else None
        got = self.run(*arrays, *scales, dtype="bfloat16")
        codes = np.round(w / scale.astype(np.float64))
        check_scaled(got, x.astype(np.int64) @ codes.astype(np.int64), scales, "bfloat16")
