"""What every backend of `block_sparse_matmul` has to do; a backend inherits it."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("KERNEL_EXAMPLES", "6")) // 2  # one takes seconds
SIZES = [1, 7, 16, 63, 64, 65, 127, 128, 129, 1000]
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # one rounding


def numbers(rng, shape, dtype):
    if dtype == "int8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.normal(size=shape).astype(jnp.dtype(dtype))


def problem(m, k, n, *, block, turned=False, share=0.5, dtype="float32", weights=None, seed=0):
    """The arguments and options of one product, one matrix; NaN in blocks that are unused.

    `k` are the columns of x and `n` those of the result, if each block is whole.
    """
    rng, (height, width) = np.random.default_rng(seed), block
    piece, side = (width, height) if turned else (height, width)
    pieces, count = -(-k // piece), -(-n // side)
    kept = np.argwhere(rng.random((count, pieces)) < share).reshape(-1, 2)
    unused = rng.integers(0, 3)
    lines = np.concatenate([kept[:, 0], np.full(unused, count)]).astype(np.int32)
    sources = np.concatenate([kept[:, 1], np.zeros(unused, int)]).astype(np.int32)
    places = rng.permutation(len(lines)).astype(np.int32)
    w = numbers(rng, (len(lines), height, width), weights or dtype)
    if w.dtype != np.int8:
        w[places[len(kept) :]] = np.nan
    x = numbers(rng, (1, m, k), dtype)
    lists = tuple(a.reshape(1, 1, -1) for a in (lines, sources, places))
    options = dict(height=height, count=count, transpose_w=turned, dtype=dtype)
    return (x, w.reshape(1, -1, width), *lists), options


def check_product(got, arrays, options):
    x, w, lines, sources, places = (np.asarray(a)[0] for a in arrays)
    height, count, turned = options["height"], options["count"], options["transpose_w"]
    w = w.astype(np.float64).reshape(-1, height, w.shape[-1])
    w = np.swapaxes(w, 1, 2) if turned else w
    _, piece, side = w.shape
    x = np.pad(x.astype(np.float64), ((0, 0), (0, -x.shape[1] % piece)))
    want, size = np.zeros((2, len(x), count * side))
    for line, source, place in zip(lines[0], sources[0], places[0]):
        if line < count:
            at = np.s_[:, line * side : (line + 1) * side]
            seen = x[:, source * piece : (source + 1) * piece]
            want[at] += seen @ w[place]
            size[at] += np.abs(seen) @ np.abs(w[place])
    # Float32 sums of at most k products; the result is rounded.
    dtype = options["dtype"]
    bound = (x.shape[1] + 8) * EPS["float32"] * size + EPS[dtype] * np.abs(want)
    assert str(got.dtype) == dtype
    assert got.shape == (1, *want.shape)
    assert np.all(np.abs(np.asarray(got[0], np.float64) - want) <= bound)


class BlockSparseMatmulSuite:
    """`product` and `sampled` call the kernels; `block(m)` makes small blocks for both."""

    dtypes = ("float32", "bfloat16", "float16")
    sides = (16, 32, 48, 128)  # of blocks

    def product(self, *arrays, **options):
        raise NotImplementedError

    def sampled(self, *arrays, **options):
        raise NotImplementedError

    def block(self, m):
        return None  # by the table

    @settings(max_examples=EXAMPLES)
    @given(
        m=st.sampled_from(SIZES),
        k=st.sampled_from(SIZES),
        n=st.sampled_from(SIZES),
        sides=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        share=st.sampled_from([0.0, 0.1, 0.5]),
        turned=st.booleans(),
        dtype=st.integers(0, 2),
        integers=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_the_sum_of_kept_blocks(self, m, k, n, sides, share, turned, dtype, integers, seed):
        dtype = self.dtypes[dtype % len(self.dtypes)]
        block = tuple(self.sides[side % len(self.sides)] for side in sides)
        weights = "int8" if integers else None
        arrays, options = problem(
            m,
            k,
            n,
            block=block,
            turned=turned,
            share=share,
            dtype=dtype,
            weights=weights,
            seed=seed,
        )
        if arrays[1].size == 0:
            return
        got = self.product(*arrays, **options, block=self.block(m))
        check_product(got, arrays, options)

    @pytest.mark.parametrize("turned", [False, True])
    def test_one_line_has_everything(self, turned):
        """The others are zeros: with 0 entries, between those that have some, and at the end."""
        side = self.sides[0]
        arrays, options = problem(7, 6 * side, 5 * side, block=(side, side), turned=turned)
        x = arrays[0]
        lines, sources = np.full(6, 2, np.int32), np.arange(6, dtype=np.int32)
        w = np.random.default_rng(0).normal(size=(1, 6 * side, side)).astype(np.float32)
        lists = (a.reshape(1, 1, -1) for a in (lines, sources, sources[::-1].copy()))
        arrays = (x, w, *lists)
        check_product(self.product(*arrays, **options), arrays, options)

    def test_several_matrices_with_lists_of_their_own(self):
        side = self.sides[0]
        both = [problem(16, 4 * side, 3 * side, block=(side, side), seed=s) for s in (0, 1)]
        least = min(a[2].shape[2] for a, _ in both)
        count = both[0][1]["count"]
        cut = []
        for (x, w, lines, sources, places), _ in both:
            keep = places[0, 0] < least  # blocks that both have room for
            lists = [np.full(least, count, np.int32), *np.zeros((2, least), np.int32)]
            for a, values in zip(lists, (lines, sources, places)):
                a[: keep.sum()] = values[0, 0, keep]
            cut.append((x, w[:, : least * side], *(a.reshape(1, 1, -1) for a in lists)))
        arrays = [np.concatenate(pair) for pair in zip(*cut)]
        got = self.product(*arrays, **both[0][1])
        for i in range(2):
            check_product(got[i : i + 1], [a[i : i + 1] for a in arrays], both[0][1])

    @settings(max_examples=EXAMPLES)
    @given(
        m=st.sampled_from(SIZES),
        k=st.sampled_from(SIZES[:-1]),
        n=st.sampled_from(SIZES[:-1]),
        sides=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        dtype=st.integers(0, 2),
        seed=st.integers(0, 99),
    )
    def test_the_sampled_product(self, m, k, n, sides, dtype, seed):
        dtype = self.dtypes[dtype % len(self.dtypes)]
        height, width = (self.sides[side % len(self.sides)] for side in sides)
        rng = np.random.default_rng(seed)
        x, g = numbers(rng, (2, m, k), dtype), numbers(rng, (2, m, n), dtype)
        entries = rng.integers(1, 5)
        lines = rng.integers(-1, -(-n // width), (2, 1, entries)).astype(np.int32)
        sources = rng.integers(0, -(-k // height), (2, 1, entries)).astype(np.int32)
        options = dict(height=height, width=width, block=self.block(m))
        got = self.sampled(x, g, lines, sources, **options)
        assert got.dtype == np.float32
        wide = lambda a, side: np.pad(
            a.astype(np.float64), ((0, 0), (0, 0), (0, -a.shape[2] % side))
        )
        x, g = wide(x, height), wide(g, width)
        for b, e in np.ndindex(2, entries):
            line, source = lines[b, 0, e], sources[b, 0, e]
            left = x[b, :, source * height : (source + 1) * height].T * (line >= 0)
            right = g[b, :, max(line, 0) * width : (max(line, 0) + 1) * width]
            error = np.abs(got[b, e * height : (e + 1) * height] - left @ right)
            # A float32 sum of m products.
            assert np.all(error <= (m + 8) * EPS["float32"] * (np.abs(left) @ np.abs(right)))

    @pytest.mark.parametrize("empty", ["rows", "entries"])
    def test_nothing_in_gives_zeros_or_nothing(self, empty):
        side = self.sides[0]
        m, e = (0, 2) if empty == "rows" else (3, 0)
        x, g = np.ones((1, m, side), np.float32), np.ones((1, m, 2 * side), np.float32)
        w, lists = np.ones((1, e * side, side), np.float32), [np.zeros((1, 1, e), np.int32)] * 3
        got = self.product(x, w, *lists, height=side, count=2)
        np.testing.assert_array_equal(got, np.zeros((1, m, 2 * side)))
        got = self.sampled(x, g, *lists[:2], height=side, width=side)
        np.testing.assert_array_equal(got, np.zeros((1, e * side, side)))
