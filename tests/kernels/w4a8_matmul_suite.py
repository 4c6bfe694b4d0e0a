"""What every backend of `w4a8_matmul` has to do; a backend inherits it and says how to run."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles

EXAMPLES = int(os.environ.get("KERNEL_EXAMPLES", "5"))  # an interpreter takes a second
SIZES = [1, 7, 16, 63, 64, 65, 127, 128, 129, 1000]
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # one rounding


def problem(m, k, n, *, group_size, x_scale=True, zero=False, b=1, seed=0, ones=False):
    """The arguments, and the activations and the decoded weight in float64.

    All bytes of a packed weight are random, those behind the last code too. With `ones`
    the scales are powers of two, and every step is exact.
    """
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (b, m, k)).astype(np.int8)
    w = rng.integers(0, 256, (b, -(-k // 64) * 32, n)).astype(np.uint8)
    groups = -(-k // group_size) if group_size and group_size < k else 1
    draw = lambda *shape: rng.uniform(0.5, 2, shape).astype(np.float32)
    scales = np.ones((b, groups, n), np.float32) if ones else draw(b, groups, n)
    rows = draw(b, m, 1) if x_scale else None
    zeros = rng.integers(-8, 8, scales.shape).astype(np.int8) if zero else None
    group = np.arange(k) // (group_size if groups > 1 else max(k, 1))
    decoded = oracles.unpack(w, 4, k, 1) - (zeros[:, group].astype(np.int64) if zero else 0)
    decoded = decoded * scales[:, group].astype(np.float64)
    exact = x.astype(np.float64) * (rows.astype(np.float64) if x_scale else 1)
    return (x, w, scales, rows, zeros), exact, decoded, groups


def check(got, x, decoded, groups, dtype="float32"):
    want, size = x @ decoded, np.abs(x) @ np.abs(decoded)
    # The sum of a group is exact below 2^24, and rounded once on its way to float32 else;
    # it is scaled, and added to those of the other groups; then a scale and the cast.
    bound = (groups + 4) * EPS["float32"] * size + EPS[dtype] * np.abs(want)
    assert str(got.dtype) == dtype
    assert got.shape == want.shape
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound)


class W4A8MatmulSuite:
    """`run(*arrays, **options)` calls the kernel; `block(m, n, k)` makes small blocks."""

    dtypes = ("float32", "bfloat16", "float16")
    groups = (None, 32, 64, 128, 256)

    def run(self, *arrays, **options):
        raise NotImplementedError

    def block(self, m, n, k, group_size):
        raise NotImplementedError

    @settings(max_examples=EXAMPLES)
    @given(
        m=st.sampled_from(SIZES),
        k=st.sampled_from(SIZES),
        n=st.sampled_from(SIZES),
        group=st.integers(0, 4),
        x_scale=st.booleans(),
        zero=st.booleans(),
        dtype=st.sampled_from(sorted(EPS)),
        seed=st.integers(0, 99),
    )
    def test_the_formula(self, m, k, n, group, x_scale, zero, dtype, seed):
        dtype = dtype if dtype in self.dtypes else "float32"
        group_size = self.groups[group % len(self.groups)]
        arrays, x, decoded, groups = problem(
            m, k, n, group_size=group_size, x_scale=x_scale, zero=zero, seed=seed
        )
        block = self.block(m, n, k, group_size)
        got = self.run(*arrays, group_size=group_size, dtype=dtype, block=block)
        check(got, x, decoded, groups, dtype)

    @pytest.mark.parametrize("zero", [False, True])
    def test_scales_of_one_give_the_integers_of_numpy(self, zero):
        """In blocks by the table; every partial sum is below 2^24, and so exact in float32."""
        for group_size in self.groups:
            arrays, x, decoded, _ = problem(
                7, 640, 65, group_size=group_size, x_scale=False, zero=zero, b=2, ones=True
            )
            got = self.run(*arrays, group_size=group_size)
            np.testing.assert_array_equal(np.asarray(got, np.float64), x @ decoded)

    def test_a_group_longer_than_a_block(self):
        arrays, x, decoded, groups = problem(16, 1000, 64, group_size=512, zero=True)
        got = self.run(*arrays, group_size=512, block=self.block(16, 64, 1000, 512))
        check(got, x, decoded, groups)

    @pytest.mark.parametrize("shape", [(0, 64, 5), (2, 0, 5), (2, 64, 0)])
    def test_nothing_in_gives_zeros_or_nothing(self, shape):
        m, k, n = shape
        x, w = np.ones((1, m, k), np.int8), np.zeros((1, k // 2, n), np.uint8)
        got = self.run(x, w, np.ones((1, 1, n), np.float32))
        np.testing.assert_array_equal(got, np.zeros((1, m, n)))

    @pytest.mark.parametrize("group_size", [None, 128])
    def test_every_code_and_the_farthest_zero_points(self, group_size):
        """Each row of x picks one code; -128 times all of them less 7, and plus 8."""
        codes = np.tile(np.arange(-8, 8), 16).astype(np.int8)
        w = np.stack([oracles.pack(codes, 4, 0)] * 2, 1)[None]
        x = np.zeros((1, 16, 256), np.int8)
        x[0, range(16), range(112, 128)] = -128
        zero = np.broadcast_to(np.array([7, -8], np.int8), (1, 2 if group_size else 1, 2))
        scale = np.ones(zero.shape, np.float32)
        got = self.run(x, w, scale, None, zero, group_size=group_size)
        want = -128.0 * (np.arange(-8, 8)[:, None] - np.array([7, -8]))
        np.testing.assert_array_equal(got[0], want)

    def test_the_longest_sum(self):
        """Without groups the sum stays in int32: -128 x -8, 131071 times, is exact there."""
        k = 131_071
        x = np.full((1, 1, k), -128, np.int8)
        w = np.full((1, -(-k // 64) * 32, 1), 0x88, np.uint8)
        block = self.block(1, 1, k, None)
        got = self.run(x, w, np.ones((1, 1, 1), np.float32), block=block)
        assert got == np.float32(128 * 8 * k)
