"""What every backend of `int8_matmul` has to do; a backend inherits it and says how to run."""

import os

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("KERNEL_EXAMPLES", "5"))  # an interpreter takes a second
SIZES = [1, 7, 16, 63, 64, 65, 127, 128, 129, 1000]
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # one rounding


def int8(*shape, seed=0):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def activated(x, name):
    """In float64, by the definitions."""
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x if name is None else x / (1 + np.exp(-x))


def exact(x, w, transpose_w, zero=None):
    w = np.asarray(w, np.int64)
    w = np.swapaxes(w, -1, -2) if transpose_w else w
    return np.asarray(x, np.int64) @ (w if zero is None else w - np.asarray(zero, np.int64))


class Int8MatmulSuite:
    """`run(*arrays, **options)` calls the kernel; `block(m, n, k)` makes small blocks."""

    dtypes = ("float32", "bfloat16", "float16")

    def run(self, *arrays, **options):
        raise NotImplementedError

    def block(self, m, n, k):
        raise NotImplementedError

    # A backend inherits it once for each of its chips, in one file.
    @settings(
        max_examples=EXAMPLES, suppress_health_check=[hypothesis.HealthCheck.differing_executors]
    )
    @given(
        m=st.sampled_from(SIZES),
        k=st.sampled_from(SIZES),
        n=st.sampled_from(SIZES),
        transpose_w=st.booleans(),
        zero=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_integers_are_those_of_numpy(self, m, k, n, transpose_w, zero, seed):
        x = int8(1, m, k, seed=seed)
        w = int8(1, *((n, k) if transpose_w else (k, n)), seed=seed + 1)
        zeros = int8(1, 1, n, seed=seed + 2) if zero else None
        got = self.run(x, w, None, None, zeros, transpose_w=transpose_w, block=self.block(m, n, k))
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, exact(x, w, transpose_w, zeros))

    @pytest.mark.parametrize("transpose_w", [False, True])
    def test_blocks_by_the_table(self, transpose_w):
        x, w = int8(2, 129, 65), int8(2, *((63, 65) if transpose_w else (65, 63)), seed=1)
        got = self.run(x, w, transpose_w=transpose_w)
        np.testing.assert_array_equal(got, exact(x, w, transpose_w))

    @pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
    def test_nothing_in_gives_zeros_or_nothing(self, shape):
        m, k, n = shape
        got = self.run(int8(1, m, k), int8(1, k, n), block=None)
        np.testing.assert_array_equal(got, np.zeros((1, m, n), np.int32))

    @pytest.mark.parametrize(("a", "b"), [(-128, -128), (-128, 127), (127, 127)])
    def test_the_largest_products_do_not_saturate(self, a, b):
        x, w = np.full((1, 1, 1000), a, np.int8), np.full((1, 1000, 7), b, np.int8)
        assert np.all(self.run(x, w, block=self.block(1, 7, 1000)) == a * b * 1000)

    def test_the_longest_sum(self):
        k = 131_071
        x, w = np.full((1, 1, k), -128, np.int8), np.full((1, k, 1), -128, np.int8)
        assert self.run(x, w, block=self.block(1, 1, k)) == 128 * 128 * k

    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("sides", ["x", "w", "xwz"])
    def test_scales_and_zero_points(self, name, sides):
        if name not in self.dtypes:
            with pytest.raises(Exception, match=name):
                self.run(int8(1, 1, 1), int8(1, 1, 1), np.ones((1, 1, 1), np.float32), dtype=name)
            return
        b, m, k, n = 2, 65, 129, 63
        rng = np.random.default_rng(0)
        x, w = int8(b, m, k), int8(b, k, n, seed=1)
        x_scale = rng.uniform(1e-3, 1e-2, (b, m, 1)).astype(np.float32) if "x" in sides else None
        w_scale = rng.uniform(1e-3, 1e-2, (b, 1, n)).astype(np.float32) if "w" in sides else None
        zero = int8(b, 1, n, seed=2) if "z" in sides else None
        got = self.run(x, w, x_scale, w_scale, zero, dtype=name, block=self.block(m, n, k))
        want = exact(x, w, False, zero).astype(np.float64)
        for scale in (x_scale, w_scale):
            want = want if scale is None else want * scale.astype(np.float64)
        assert got.dtype == np.dtype(got.dtype)
        assert str(got.dtype) == name
        # The sums are exact in float32; two scales and the cast are a rounding each. Below
        # the normal range of float16 (2^-14) a rounding is absolute: half of 2^-24.
        bound = (3 * EPS["float32"] + EPS[name]) * np.abs(want)
        bound += 2.0**-25 if name == "float16" else 0
        assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound)

    @pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
    @pytest.mark.parametrize("codes", [False, True])
    def test_what_follows_the_product(self, activation, codes):
        b, m, k, n = 2, 65, 129, 63
        rng = np.random.default_rng(0)
        x, w = int8(b, m, k), int8(b, k, n, seed=1)
        scales = [rng.uniform(3e-3, 1e-2, s).astype(np.float32) for s in ((b, m, 1), (b, 1, n))]
        bias = rng.normal(size=(b, 1, n)).astype(np.float32)
        out_scale = rng.uniform(0.01, 0.1, (b, 1, n)).astype(np.float32) if codes else None
        operands = (x, w, *scales, None, bias, out_scale)
        got = self.run(*operands, activation=activation, block=self.block(m, n, k))
        sums = exact(x, w, False) * scales[0].astype(np.float64) * scales[1].astype(np.float64)
        want = activated(sums + bias, activation)
        # Roundings of the sum before it meets the bias, then one of each step that follows;
        # an activation's slope is below 1.2, and exp is good to a few units.
        error = 16 * EPS["float32"] * (np.abs(sums) + np.abs(bias) + 1)
        if not codes:
            assert np.all(np.abs(got.astype(np.float64) - want) <= error)
            return
        assert got.dtype == np.int8
        real = np.clip(want / out_scale, -127, 127)
        assert np.all(np.abs(got - real) <= 0.5 + error / out_scale)
        assert np.abs(got.astype(int)).max() == 127
