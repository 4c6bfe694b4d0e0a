"""`quantized_matmul` against its formula in float64: widths, groups, zero points, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
import oracles

EPS = 2.0**-24
DTYPES = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # one rounding


def problem(
    *,
    bits=8,
    lead=(),
    batched=False,
    m=3,
    k=33,
    n=5,
    group_size=None,
    zero=False,
    transpose_w=False,
    packed=True,
    dtype="float32",
    seed=0,
):
    """Arguments of `quantized_matmul`, and its answer with the magnitudes that it sums."""
    rng = np.random.default_rng(seed)
    w_lead, low = (lead if batched else ()), -(2 ** (bits - 1))
    x = rng.normal(size=(*lead, m, k)).astype(jnp.dtype(dtype))
    codes = rng.integers(low, -low, (*w_lead, k, n)).astype(np.int8)
    groups = 1 if group_size is None or group_size >= k else -(-k // group_size)
    scale = rng.uniform(0.5, 2, (*w_lead, groups, n)).astype(np.float32)
    zeros = rng.integers(low, -low, scale.shape).astype(np.int8) if zero else None

    group = np.arange(k) // (group_size or max(k, 1))
    decoded = codes.astype(np.float64)
    if zero:
        decoded = decoded - zeros[..., group, :].astype(np.float64)
    decoded = decoded * scale[..., group, :].astype(np.float64)
    exact = np.asarray(x, np.float64)

    stored = oracles.pack(codes, bits, -2) if packed and bits < 8 else codes
    turn = functools.partial(np.swapaxes, axis1=-1, axis2=-2) if transpose_w else lambda a: a
    arrays = (x, turn(stored), turn(scale), turn(zeros) if zero else None)
    options = dict(bits=bits, group_size=group_size, transpose_w=transpose_w)
    return arrays, options, exact, decoded


def assert_product(got, x, decoded, dtype, grouped):
    want, size = x @ decoded, np.abs(x) @ np.abs(decoded)
    # Products are summed in float32; a weight with groups is rounded to the dtype of x
    # before, and the result after.
    low = DTYPES[dtype]
    bound = ((x.shape[-1] + 8) * EPS + (low if grouped else 0)) * size + low * np.abs(want)
    assert got.dtype == jnp.dtype(dtype)
    assert got.shape == want.shape
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound + 1e-30)


@given(
    bits=st.integers(2, 8),
    lead=st.sampled_from([(), (2,), (2, 3)]),
    batched=st.booleans(),
    m=st.sampled_from([0, 1, 3]),
    k=st.sampled_from([0, 1, 33, 64, 70]),
    n=st.sampled_from([0, 1, 5]),
    group_size=st.sampled_from([None, 1, 8, 32, 100]),
    zero=st.booleans(),
    transpose_w=st.booleans(),
    packed=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    implementation=st.sampled_from(["xla", "reference"]),
    seed=st.integers(0, 99),
)
def test_the_formula(implementation, **kwargs):
    arrays, options, x, decoded = problem(**kwargs)
    options |= dict(implementation=implementation)
    got = jax.jit(lambda *a: jc.ops.quantized_matmul(*a, **options))(*arrays)
    assert_product(got, x, decoded, kwargs["dtype"], kwargs["group_size"] is not None)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits):
    """All widths in one place, whatever the examples above happen to draw."""
    for options in (dict(), dict(group_size=16, zero=True), dict(transpose_w=True, k=128)):
        arrays, options, x, decoded = problem(bits=bits, **options)
        got = jc.ops.quantized_matmul(*arrays, **options)
        assert_product(got, x, decoded, "float32", options["group_size"] is not None)


@pytest.mark.parametrize("k", [1, 100, 4096])
def test_digits_are_exact_to_2_to_the_minus_28_of_the_largest(k):
    """What the digits leave out of x times w is below half a unit of the last of them.

    The scale of a row is at most twice its largest over 127, and the last digit counts
    2^-21 of it: half of that is 2^-27.9 of the largest.
    """
    x = np.random.default_rng(k).normal(size=(1, k)).astype(np.float32)
    x *= np.float32(2.0) ** np.random.default_rng(k).integers(-40, 40, (1, k))  # any magnitudes
    w, scale = np.eye(k, dtype=np.int8), np.ones((1, k), np.float32)
    got = jc.ops.quantized_matmul(x, w, scale, implementation="xla")
    error = np.abs(np.asarray(got, np.float64) - x)
    assert np.all(error <= 2.0**-27.9 * np.abs(x).max() + EPS * np.abs(x))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_and_no_other(bad):
    x = np.ones((3, 70), np.float32)
    x[1, 5] = bad
    got = jc.ops.quantized_matmul(x, W + 1, SCALE, implementation="xla")
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[::2], np.full((2, 4), 70.0))


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-45, 3e38])
def test_rows_at_the_ends_of_float32(size):
    """A row below 1e-30 counts as zero, and the largest numbers do not overflow."""
    got = jc.ops.quantized_matmul(X + np.float32(size), W + 1, SCALE / 70, implementation="xla")
    np.testing.assert_allclose(got, np.full((3, 4), size), rtol=2.0**-22, atol=1e-30)


def test_sums_are_float32_whatever_goes_in():
    """2048 + 1 + 1 + ... stays 2048 in float16, and in bfloat16 from 256 on."""
    for dtype, start in (("float16", 2048.0), ("bfloat16", 256.0)):
        x = jnp.ones((1, 4097), dtype).at[0, 0].set(start)
        w, scale = np.ones((4097, 1), np.int8), np.full((1, 1), 2.0**-6, np.float32)
        got = jc.ops.quantized_matmul(x, w, scale, dtype=jnp.float32)
        assert float(got[0, 0]) == (start + 4096) / 64


def test_a_sum_of_codes_may_leave_float16():
    x, w = jnp.full((1, 1024), 4.0, jnp.float16), np.full((1024, 1), 127, np.int8)
    got = jc.ops.quantized_matmul(x, w, np.full((1, 1), 2.0**-7, np.float32))
    assert got.dtype == jnp.float16
    assert float(got[0, 0]) == 4064.0  # 1024 * 4 * 127 / 128; the codes sum to 520192


def test_the_result_has_the_dtype_that_is_asked_for():
    arrays, options, x, decoded = problem(dtype="bfloat16")
    got = jc.ops.quantized_matmul(*arrays, **options, dtype=jnp.float32)
    assert got.dtype == jnp.float32
    size = np.abs(x) @ np.abs(decoded)
    np.testing.assert_array_less(np.abs(got - x @ decoded), (33 + 8) * EPS * size)


X, W = np.zeros((3, 70), np.float32), np.zeros((70, 4), np.int8)
SCALE = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "takes floating activations; x is int8", (np.int8(X), W, SCALE), {}),
        (
            TypeError,
            "w must be int8, or packed uint8 of 2 to 7 bits; it is float32",
            (X, X, SCALE),
            {},
        ),
        (TypeError, "it is uint8", (X, np.uint8(W), SCALE), dict(bits=8)),
        (
            ValueError,
            r"70 codes of 4 bits take 64 bytes along axis 0; w has the shape \(70, 4\)",
            (X, np.uint8(W), SCALE),
            dict(bits=4),
        ),
        (ValueError, r"expected x\[..., m, k\] and w\[..., k, n\]", (X[:, 1:], W, SCALE), {}),
        (ValueError, r"expected scale of the shape \(1, 4\)", (X, W, SCALE[0]), {}),
        (
            ValueError,
            r"expected scale of the shape \(3, 4\)",
            (X, W, SCALE[[0, 0]]),
            dict(group_size=32),
        ),
        (ValueError, "group_size must be positive", (X, W, SCALE), dict(group_size=-1)),
        (ValueError, r"expected zero_point of", (X, W, SCALE, np.int8(W)), {}),
        (
            ValueError,
            "there are 'cpu', 'xla', 'pallas_tpu', 'triton'",
            (X, W, SCALE),
            dict(implementation="fast"),
        ),
        (
            ValueError,
            "'xla' cannot run: it sums at most 65793 products exactly, not 65794",
            (np.zeros((1, 65794), np.float32), np.zeros((65794, 1), np.int8), SCALE[:, :1]),
            dict(implementation="xla"),
        ),
    ],
)
def test_what_it_cannot_do_is_said(error, message, args, options):
    with pytest.raises(error, match=message):
        jc.ops.quantized_matmul(*args, **options)
