"""Formats that are no plain integers: their numbers, their scales, and what they lose."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import stats

import jaxcompress as jc
from checks import assert_valid, quantized, random
from jaxcompress.arrays import CodebookType, FloatType, IntType, OddType, TernaryType

SPECS = {
    name: getattr(jc.quantize, name)
    for name in ("binary", "ternary", "nf4", "fp8_e4m3", "fp8_e5m2", "mxfp8", "mxfp4", "nvfp4")
}
FLOATS = {
    ml_dtypes.float8_e4m3fn: FloatType(4, 3, 448.0),
    ml_dtypes.float8_e5m2: FloatType(5, 2, 57344.0),
    ml_dtypes.float4_e2m1fn: FloatType(2, 1, 6.0),
}


def small_floats(exponent, mantissa, largest):
    """All non-negative numbers of a format, from its definition."""
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    numbers = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    for e, m in itertools.product(range(1, 2**exponent), range(steps)):
        numbers.append((1 + m / steps) * 2.0 ** (e - bias))
    return [n for n in numbers if n <= largest]


@functools.cache
def numbers(qtype):
    """Every number of a format, ascending, in float64."""
    if isinstance(qtype, FloatType):
        half = small_floats(qtype.exponent, qtype.mantissa, qtype.largest)
        return np.array(sorted({*half, *(-n for n in half)}))
    if isinstance(qtype, OddType):
        return np.arange(-(2**qtype.bits) + 1, 2**qtype.bits, 2, np.float64)
    if isinstance(qtype, TernaryType):
        return np.array([-1.0, 0, 1])
    return np.array(qtype.table, np.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.__name__)
def test_floats_are_those_of_ml_dtypes(dtype):
    """Codes are its bit patterns, and rounding is its cast, ties to even included."""
    qtype, size = FLOATS[dtype], 2 ** FLOATS[dtype].bits
    patterns = np.arange(size, dtype=np.uint8).view(dtype).astype(np.float32)
    finite = np.abs(patterns) <= qtype.largest
    codes = np.arange(size, dtype=np.uint8)[finite]
    signed = codes.astype(np.int8) if size == 256 else ((codes + 8) % 16).astype(np.int8) - 8
    np.testing.assert_array_equal(qtype.decode(jnp.asarray(signed)), patterns[finite])
    encoded = np.asarray(qtype.encode(jnp.asarray(patterns[finite]))).astype(np.int64) % size
    np.testing.assert_array_equal(encoded, codes)
    middle = (numbers(qtype)[1:] + numbers(qtype)[:-1]) / 2
    x = np.concatenate([middle, numbers(qtype), random(2000) * qtype.largest / 3]).astype(
        np.float32
    )
    x = x[np.abs(x) <= qtype.largest]
    np.testing.assert_array_equal(qtype.nearest(jnp.asarray(x)), x.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("bits", range(1, 9))
def test_odd_integers(bits):
    qtype = OddType(bits)
    want = numbers(qtype)
    codes = jnp.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=jnp.int32).astype(jnp.int8)
    np.testing.assert_array_equal(qtype.decode(codes), want)
    np.testing.assert_array_equal(qtype.encode(jnp.asarray(want, jnp.float32)), codes)
    assert (qtype.low, qtype.high) == (want[0], want[-1])
    assert qtype.integer == (bits < 8)  # 255 is no int8
    x = np.random.default_rng(0).uniform(qtype.low, qtype.high, 500).astype(np.float32)
    distance = np.abs(x[:, None] - want)
    got = np.asarray(qtype.nearest(jnp.asarray(x)))
    np.testing.assert_array_equal(np.abs(x - got), distance.min(1).astype(np.float32))


def test_nf4_are_quantiles_of_a_normal_distribution():
    """The published construction: 8 quantiles above zero, 7 below, and zero."""
    offset = 0.9677083
    above = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    want = np.sort(np.concatenate([above, below, [0]])) / above.max()
    np.testing.assert_allclose(jc.quantize.nf4().qtype.table, want, atol=1e-6)


def decoded(q):
    return np.asarray(q.materialise(), np.float64)


def scales(q):
    """One for each weight, in float64, from the leaves."""
    scale = np.asarray(q.scale).astype(np.float64)
    if q.outer_scale is not None:
        scale = scale * np.asarray(q.outer_scale, np.float64)
    for i, a in enumerate(q.axis):
        if q.group_size is not None:
            scale = np.repeat(scale, q.group_size[i], a)
    index = tuple(slice(0, n) if m != 1 else slice(None) for n, m in zip(q.shape, scale.shape))
    return np.broadcast_to(scale[index], q.shape)


DISTRIBUTIONS = {
    "gaussian": lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32),
    # Laplace: the kurtosis of trained weights with outliers, 6.
    "heavy": lambda *shape: np.random.default_rng(0).laplace(size=shape).astype(np.float32),
}


@pytest.mark.parametrize("shape", [(100, 6), (3, 33, 5), (64,), (1, 1)])
@pytest.mark.parametrize("name", [n for n in SPECS if n != "ternary"])
def test_every_weight_becomes_the_nearest_number(name, shape):
    w = random(*shape, seed=len(shape)) * np.float32(0.05)
    spec = SPECS[name](axis=-1) if len(shape) == 1 else SPECS[name]()
    q = quantized(w, spec)
    assert_valid_scales(q)
    step = scales(q)
    least = np.abs(w[..., None] - numbers(q.qtype) * step[..., None]).min(-1)
    # The quotient is rounded before it is compared: 2^-22 of the largest number at most.
    slack = 2.0**-22 * q.qtype.high * step
    assert np.all(np.abs(w - decoded(q)) <= least + slack)


def assert_valid_scales(q):
    assert_valid(q)
    assert q.scale.dtype == {"e8m0": jnp.float8_e8m0fnu, "e4m3": jnp.float8_e4m3fn}.get(
        getattr(q.qtype, "scales", "float32"), jnp.float32
    )
    if q.outer_scale is not None:
        whole = tuple(1 if a - q.ndim in q.axis else n for a, n in enumerate(q.shape))
        assert q.outer_scale.shape == whole


def test_scales_are_as_documented():
    w = DISTRIBUTIONS["heavy"](96, 5) * np.float32(0.01)
    groups = np.abs(w.astype(np.float64)).reshape(3, 32, 5).max(1)
    q = {name: quantized(w, SPECS[name]()) for name in SPECS}
    for name, high in (("mxfp4", 4), ("mxfp8", 256)):
        want = 2.0 ** (np.floor(np.log2(groups)) - np.log2(high))
        np.testing.assert_array_equal(np.asarray(q[name].scale).astype(np.float64), want)
    whole = np.abs(w).max(0, keepdims=True)
    np.testing.assert_allclose(q["nvfp4"].outer_scale, whole / 6 / 448, rtol=1e-6)
    halves = np.abs(w).reshape(6, 16, 5).max(1) / 6 / np.asarray(q["nvfp4"].outer_scale)
    got = np.asarray(q["nvfp4"].scale).astype(np.float32)
    # Three mantissa bits: half a step is 1/16 of a number at most.
    np.testing.assert_allclose(got, halves, rtol=1 / 16)
    np.testing.assert_allclose(q["binary"].scale, np.abs(w).mean(0, keepdims=True), rtol=1e-6)
    limit = 0.7 * np.abs(w.astype(np.float64)).mean(0)
    kept = np.abs(w) > limit
    np.testing.assert_array_equal(np.asarray(q["ternary"].materialise()) != 0, kept)
    mean = np.where(kept, np.abs(w), 0).sum(0) / kept.sum(0)
    np.testing.assert_allclose(q["ternary"].scale[0], mean, rtol=1e-6)
    np.testing.assert_allclose(q["fp8_e4m3"].scale, whole / 448, rtol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_zeros_denormals_and_what_is_not_finite(name):
    w = np.zeros((32, 3), np.float32)
    w[:, 1] = 1e-40
    q = quantized(w, SPECS[name]())
    assert np.isfinite(decoded(q)).all()
    if name != "binary":  # which has no zero: its scale is 1 there
        np.testing.assert_array_equal(decoded(q), 0)
    w[0, 2] = np.inf
    spec = SPECS[name](axis=0) if name == "nvfp4" else SPECS[name]()
    with pytest.raises(ValueError, match="'w' holds NaN or infinity"):
        quantized(w, spec)
    inside = jax.jit(lambda w: quantized(w, spec).materialise())(w)
    assert np.isnan(inside[:, 2]).all()
    assert np.isfinite(inside[:, :2]).all()


def sqnr(w, q):
    w = np.asarray(w, np.float64)
    return 10 * np.log10(np.sum(w**2) / np.sum((w - decoded(q)) ** 2))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", [n for n in SPECS if n not in ("binary", "ternary")])
def test_the_noise_is_that_of_the_gaps(name, distribution):
    """A number between two of the format errs by `gap^2 / 12` on average, whatever the weights.

    That is the variance of an error that is even within the gap. It is nearly so where
    the density changes little across one; the wide gaps at the end of four-bit formats
    hold more weights at their lower side, which is worth a tenth. Beyond the ends (block
    formats saturate) the error is what is cut off.
    """
    w = DISTRIBUTIONS[distribution](512, 16)
    q = quantized(w, SPECS[name]())
    grid, step = numbers(q.qtype), scales(q)
    x = w.astype(np.float64) / step
    place = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    gap = (grid[place] - grid[place - 1]) * step
    beyond = np.maximum(np.abs(x) - grid[-1], 0) * step
    expected = np.where(beyond > 0, beyond**2, gap**2 / 12).sum()
    assert np.sum((w - decoded(q)) ** 2) <= 1.1 * expected


# Floors in dB, Gaussian and heavy-tailed (Laplace), per channel of 512 or the format's group.
#
# binary: the error of `m sign(w)`, m = E|w|, is E w^2 - m^2. Gaussian 1 - 2/pi: 4.40 dB;
#   Laplace (E|w| = b, E w^2 = 2 b^2) 1/2: 3.01 dB.
# ternary: E w^2 - s^2 P(|w| > d) with s = E(|w| given |w| > d), d = 0.7 E|w|. Gaussian:
#   1 - 2 phi(d)^2 / Q(d) at d = .5585, .192: 7.17 dB; Laplace: s = b + d = 1.7 b and
#   P = e^-.7, 1 - 1.7^2 e^-.7 / 2 = .2825: 5.49 dB.
# fp8: with m mantissa bits the gap at w is at least w 2^-(m+1) and at most w 2^-m, so the
#   noise is at most 2^-2m / 12 of the signal: 28.85 dB and 22.83 dB, for any distribution
#   (a per-channel scale puts what is subnormal 2^14 below the largest).
# nf4, groups of 64: even in probability, so coarse in the tail. Gaussian with its largest
#   at 2.65 sigma: the integral of gap^2 / 12 over the density, the centre (gaps of .23
#   sigma) .0045 and the tails (.4 to .8 sigma) .0055, sums to about .010: 20 dB. Laplace,
#   largest at 3.5 sigma: gaps grow by a third, 1.3^2 times the noise: 17 dB.
# mxfp8: as fp8, but a group's largest lies between 256 and 512 steps and saturates above
#   448, by an eighth at most; in a group of 32 it has .17 (Gaussian; .28 Laplace) of the
#   energy: at most .0013 + .17 / 64: 24.0 dB; .0013 + .28 / 64: 22.4 dB.
# mxfp4: gaps of .5, 1, 2 steps below 2, 4, 6, saturation to 8. Gaussian, largest 2.3 sigma:
#   if that is 8 steps, .44 / 48 + .32 / 12 + .16 / 3 + .08 * 1.33 = .195 of 11.7: 17.8 dB;
#   if it is 4 steps, .76 / 48 + .22 / 12 + .02 / 3 = .041 of 2.9: 18.5 dB. Laplace:
#   largest 2.9 sigma: at 8 steps (sigma 2.8), .63 / 48 + .23 / 12 + .09 / 3 + .05 * 1.33
#   = .13 of 7.6: 17.7 dB.
# nvfp4, groups of 16, largest at 6 steps: Gaussian, 2.0 sigma = 6: .50 / 48 + .32 / 12 +
#   .14 / 3 = .083 of 9: 20.3 dB; Laplace, 2.4 sigma = 6: .68 / 48 + .22 / 12 + .1 / 3 =
#   .066 of 6.2: 19.8 dB.
# Half a dB is left to what these averages leave out.
FLOORS = {
    "binary": (4.40 - 0.1, 3.01 - 0.1),  # exact, up to the sample
    "ternary": (7.17 - 0.1, 5.49 - 0.1),
    "nf4": (19.5, 16.5),
    "fp8_e4m3": (28.85, 28.85),
    "fp8_e5m2": (22.83, 22.83),
    "mxfp8": (24.0, 22.4),
    "mxfp4": (17.3, 17.2),
    "nvfp4": (19.8, 19.3),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", SPECS)
def test_sqnr_floors(name, distribution):
    w = DISTRIBUTIONS[distribution](512, 64)
    assert sqnr(w, quantized(w, SPECS[name]())) >= FLOORS[name][distribution == "heavy"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sqnr_floors_of_integers(bits, distribution):
    """`scale^2 / 12` where a gap is even in probability, and never more than `scale^2 / 4`.

    A group of 32 has its largest at about 2.3 sigma (Gaussian) or 2.9 (Laplace: b H_32), its
    mean square is 5.5 or 9.05 sigma^2. With 127, 7 and 3 steps to it that is 10 log10(12
    steps^2 / 5.5): 45.5, 20.3 and 12.9 dB; Laplace 43.3, 18.1 and 10.8; half a dB off. At two
    bits what is below half of the largest is lost and the rest becomes the largest: .287 +
    .155 of the energy, 3.5 dB; Laplace .332 + .136, 3.3 dB; a third of a dB off.
    """
    w = DISTRIBUTIONS[distribution](512, 64)
    got = sqnr(w, quantized(w, jc.quantize.Spec(qtype=IntType(bits), group_size=32)))
    floors = {8: (45.0, 42.8), 4: (19.8, 17.6), 3: (12.4, 10.3), 2: (3.2, 3.0)}
    assert got >= floors[bits][distribution == "heavy"]


@pytest.mark.parametrize(
    ("name", "bits"),
    [("binary", 1), ("ternary", 2), ("nf4", 4.5), ("fp8_e4m3", 8), ("fp8_e5m2", 8)]
    + [("mxfp8", 8.25), ("mxfp4", 4.25), ("nvfp4", 4.5)],
)
def test_bytes_are_the_bits_of_the_format(name, bits):
    """Scales of float32 per channel and outer ones, 32 bits each, are what comes on top."""
    q = quantized(random(512, 64), SPECS[name]())
    if name == "nf4":  # float32 scales for 64 weights
        assert q.nbytes * 8 == 512 * 64 * 4.5
    else:
        outer = 0 if name.startswith("mx") else 64 * 32
        assert q.nbytes * 8 == 512 * 64 * bits + outer


def test_formats_that_make_no_sense_are_refused():
    for bits in (0, 9):
        with pytest.raises(ValueError, match="odd integers are 1 to 8 bits"):
            OddType(bits)
    with pytest.raises(ValueError, match="scales are float32, e8m0 or e4m3; got 'e5m2'"):
        FloatType(2, 1, 6.0, scales="e5m2")
    with pytest.raises(ValueError, match="8 bits at most"):
        FloatType(5, 3, 1.0)
    with pytest.raises(ValueError, match="'c' has 3"):
        CodebookType("c", (-1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="ascending"):
        CodebookType("c", (1.0, -1.0))
    with pytest.raises(ValueError, match="'w': learned scales need a symmetric spec with float32"):
        jc.quantize.prepare_qat({"w": jnp.ones((4, 4))}, {"w": SPECS["mxfp4"]()}, learn_scale=True)
