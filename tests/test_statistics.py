"""Calibration statistics against NumPy on the data itself, and the triples they are made of."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import through
from jaxcompress import _histogram as hist

STATISTICS = {
    "absmax": jc.statistics.absmax(),
    "minmax": jc.statistics.minmax(),
    "moving_average": jc.statistics.moving_average(0.5),
    "percentile": jc.statistics.percentile(99.0),
    "mse": jc.statistics.mse(4),
    "entropy": jc.statistics.entropy(8),
    "snr": jc.statistics.snr(4),
}


def rows(*shape, seed=0, heavy=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, shape) if heavy else rng.normal(size=shape)
    return x.astype(np.float32)


def calibrated(statistic, batches):
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((batches[0].shape[-1], 1))}
    return jc.calibrate(fn, params, [jnp.asarray(b) for b in batches], statistic)["w"]


BATCHES = [rows(50, 8, seed=i, heavy=True) for i in range(3)]


@functools.cache
def triple(name):
    return through(STATISTICS[name], BATCHES)


@pytest.mark.parametrize("name", STATISTICS)
def test_calibrate_is_the_triple(name):
    """One weight, three batches: the tap carries what `of` saw and changes nothing."""
    found = calibrated(STATISTICS[name], BATCHES)
    assert found.count.shape == (1, 1)
    assert float(found.count[0, 0]) == 150
    # Sums of whole numbers and maxima are exact; jit may round an average otherwise.
    np.testing.assert_allclose(found.value[0, 0], triple(name), rtol=1e-6)


def test_the_range_of_all_batches():
    data = np.concatenate(BATCHES)
    np.testing.assert_array_equal(triple("absmax"), np.abs(data).max())
    np.testing.assert_array_equal(triple("minmax"), [data.min(), data.max()])
    np.testing.assert_array_equal(through(STATISTICS["minmax"], [np.abs(data)])[0], 0)


def test_a_moving_average_is_the_weighted_mean_of_the_batches():
    weights = np.array([0.25, 0.5, 1]) / 1.75  # decay 0.5, newest last, weights add up to one
    ends = np.array([[b.min(), b.max()] for b in BATCHES], np.float64)
    np.testing.assert_allclose(triple("moving_average"), weights @ ends, rtol=1e-6)
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
            jc.statistics.moving_average(decay)


def test_a_histogram_counts_every_number_in_its_bin():
    x = np.concatenate([rows(4000), [0, -0.0, 1e-30, -1e-12, 1.0, -1.0, 2.0**31]])
    counts = np.asarray(hist.histogram(jnp.asarray(x, jnp.float32)[:, None]))
    edges = hist.edges().astype(np.float64)
    assert np.all(np.diff(edges) > 0)
    # A bin holds its lower border: 1 is in the first bin of its octave.
    for sign, side in ((-1, x[x < 0]), (1, x[x >= 0])):
        want, _ = np.histogram(np.abs(side), edges)
        np.testing.assert_array_equal(counts[(sign + 1) // 2], want)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 2.0**32])
@pytest.mark.parametrize("name", ["percentile", "mse", "entropy", "snr"])
def test_what_is_not_finite_is_not_hidden(name, bad):
    x = rows(20, 4)
    x[3, 2] = bad
    assert np.isnan(through(STATISTICS[name], [x])).all()


@pytest.mark.parametrize("percent", [80.0, 99.0, 100.0])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 3e4])
def test_percentiles(percent, scale):
    x = rows(20_000, 1) * np.float32(scale)
    got = through(jc.statistics.percentile(percent), [x[:5000], x[5000:]])
    beyond = (100 - percent) / 2
    want = np.percentile(x.astype(np.float64), [beyond, 100 - beyond])
    # The right bin, which is at most 1/32 of its numbers wide.
    np.testing.assert_allclose(got, want, rtol=1 / 32)
    share = np.mean((x < got[0]) | (x > got[1]))
    # Linear within a bin: a bin of width 1/32 near the median of 20,000 normal numbers
    # holds under 1 % of them, and is not off by more than that.
    assert abs(share - 2 * beyond / 100) < 0.01


def test_a_percentile_of_one_side_leaves_the_other_at_zero():
    got = through(jc.statistics.percentile(90.0), [np.maximum(rows(5000, 1) - 2, 0)])
    assert got[0] == 0
    with pytest.raises(ValueError, match="percent must be above 0"):
        jc.statistics.percentile(0)


def squared_error(x, low, high, steps):
    """Of rounding to the grid, from the data."""
    scale = (high - low) / steps
    first = np.rint(low / scale)
    codes = np.clip(np.rint(x / scale), first, first + steps)
    return np.sum((x - codes * scale) ** 2)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_near_the_best_range_of_the_data(bits, heavy):
    x = rows(20_000, 1, seed=bits, heavy=heavy).astype(np.float64)
    low, high = through(jc.statistics.mse(bits), [x])
    assert low == -high
    steps = 2**bits - 2
    best = min(squared_error(x, -t, t, steps) for t in np.geomspace(0.01, 1, 300) * np.abs(x).max())
    # Candidates are 4.4 % apart and the error is quadratic at its least: 2 % is what
    # half a step away, and bins instead of data, may cost.
    assert squared_error(x, low, high, steps) <= 1.02 * best


@pytest.mark.parametrize(
    ("low", "high", "steps"), [(-2.0, 2.0, 14), (-0.5, 2.5, 255), (0.0, 1.0, 3)]
)
def test_the_error_of_a_range_is_that_of_the_data(low, high, steps):
    x = rows(100_000, 1, heavy=True)
    got = float(hist.noise(hist.histogram(jnp.asarray(x)), low, high, steps))
    want = squared_error(x.astype(np.float64), low, high, steps)
    # 100,000 numbers in bins: where they lie within one averages out to about 1 %.
    assert abs(got - want) < 0.01 * want


def test_an_asymmetric_range_follows_the_data():
    x = np.maximum(rows(20_000, 1), 0)
    low, high = through(jc.statistics.mse(4, symmetric=False), [x])
    assert low == 0
    symmetric = through(jc.statistics.mse(4), [x])[1]
    error = squared_error(x, low, high, 15)
    assert error < squared_error(x, -symmetric, symmetric, 14) / 2  # a bit more: a quarter at best


def divergence(x, threshold, largest, levels, bins=2048):
    """Migacz's procedure on the data, in loops."""
    counts, _ = np.histogram(np.abs(x), bins, (0, largest))
    size = min(bins, max(levels, int(np.rint(threshold / largest * bins))))
    p = counts[:size].astype(np.float64)
    kept = p.copy()
    p[-1] += counts[size:].sum()
    q = np.zeros(size)
    for level in range(levels):
        inside = [i for i in range(size) if i * levels // size == level]
        filled = [i for i in inside if p[i] > 0]
        for i in filled:
            q[i] = kept[inside].sum() / len(filled)
    p, q = p / p.sum(), q / q.sum()
    return sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, q) if a > 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_is_near_the_least_divergence(bits):
    x = rows(200_000, 1, seed=1, heavy=True).astype(np.float64)
    x = np.clip(x, -12, 12)
    _, high = through(jc.statistics.entropy(bits), [x])
    largest, levels = np.abs(x).max(), 2 ** (bits - 1)
    ours = divergence(x, high, largest, levels)
    sizes = range(128, 2049, 64)
    best = min(divergence(x, s / 2048 * largest, largest, levels) for s in sizes)
    # The fixed bins smooth the 2048 linear ones, whose own noise is a part of both.
    assert ours <= 1.1 * best + 0.002


def test_snr_counts_batches_and_mse_counts_energy():
    small, large = rows(4000, 1), 100 * rows(400, 1, seed=1)
    one = through(jc.statistics.snr(4), [small])
    alone = through(jc.statistics.mse(4), [small])
    np.testing.assert_allclose(one, alone, rtol=0.1)  # candidates are 9 % and 4 % apart
    both = [small, small, large]
    assert through(jc.statistics.snr(4), both)[1] < 5
    assert through(jc.statistics.mse(4), both)[1] > 100


def test_zeros_have_an_empty_range():
    for name in ("minmax", "moving_average", "percentile", "mse", "entropy", "snr"):
        np.testing.assert_array_equal(through(STATISTICS[name], [np.zeros((5, 3))]), [0, 0])


@pytest.mark.parametrize("make", [jc.statistics.mse, jc.statistics.entropy, jc.statistics.snr])
def test_widths_are_two_to_eight(make):
    for bits in (1, 9):
        with pytest.raises(ValueError, match="bits must be 2 to 8"):
            make(bits)
    assert make(4) is make(4)  # or each use would compile anew
