"""`int8_matmul` is exact: every implementation equals numpy's int64, bit for bit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
from checks import assert_sums
from jaxcompress.ops import _int8_matmul
from jaxcompress.ops._choice import Problem

int8_matmul = jc.ops.int8_matmul
MAX_K = 131_071


def int8(*shape, seed=0):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def exact(x, w, transpose_w=False):
    w = np.asarray(w, np.int64)
    return np.asarray(x, np.int64) @ (np.swapaxes(w, -1, -2) if transpose_w else w)


@st.composite
def problems(draw):
    """Operands of any size, 0 and 1 and odd, and an implementation that takes them."""
    name = draw(st.sampled_from(["xla", "reference", None]))
    lead = draw(st.sampled_from([(), (2,), (2, 3), (0,)]))
    batched = bool(lead) and draw(st.booleans())
    m = draw(st.sampled_from([0, 1, 3, 8, 9, 17]))
    k, n = draw(st.sampled_from([0, 1, 5, 64])), draw(st.sampled_from([0, 1, 7]))
    transpose_w = draw(st.booleans())
    seed = draw(st.integers(0, 99))
    w_shape = (n, k) if transpose_w else (k, n)
    x, w = int8(*lead, m, k, seed=seed), int8(*(lead if batched else ()), *w_shape, seed=seed + 1)
    return x, w, dict(transpose_w=transpose_w, implementation=name)


@given(problems())
def test_integers_are_those_of_numpy(problem):
    x, w, options = problem
    got = jax.jit(lambda x, w: int8_matmul(x, w, **options))(x, w)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, exact(x, w, options["transpose_w"]))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("a", "b"), itertools.product([-128, 127], repeat=2))
def test_the_longest_sum_of_the_largest_products(implementation, a, b):
    """The shifted product of the xla kernel passes 2^31 on the way, and comes back."""
    x, w = np.full((8, MAX_K), a, np.int8), np.full((MAX_K, 2), b, np.int8)
    got = int8_matmul(x, w, implementation=implementation)
    assert np.all(np.asarray(got, np.int64) == a * b * MAX_K)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_one_more_product_is_refused(implementation):
    x, w = np.zeros((8, MAX_K + 1), np.int8), np.zeros((MAX_K + 1, 1), np.int8)
    with pytest.raises(ValueError, match="at most 131071 products of int8; got 131072"):
        int8_matmul(x, w, implementation=implementation)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_zero_points_make_the_longest_sum_shorter(implementation):
    k = 65_793
    x, w = np.full((8, k), -128, np.int8), np.full((k, 1), -128, np.int8)
    zero = np.array([[127]], np.int8)
    got = int8_matmul(x, w, w_zero_point=zero, implementation=implementation)
    assert np.all(np.asarray(got, np.int64) == 128 * 255 * k)
    with pytest.raises(ValueError, match="at most 65793 products of int8; got 65794"):
        int8_matmul(np.zeros((8, k + 1), np.int8), np.zeros((k + 1, 1), np.int8), w_zero_point=zero)


def test_groups_are_summed_apart_and_may_be_many():
    k = MAX_K + 1
    x, w = np.full((1, k), -128, np.int8), np.full((k, 1), -128, np.int8)
    got = int8_matmul(x, w, w_scale=np.ones((2, 1), np.float32), group_size=k // 2)
    assert float(got[0, 0]) == 128.0 * 128 * k  # a power of two, exact in float32


def scaled(x, w, x_scale, w_scale, zero, group_size, transpose_w):
    """The documented formula in float64, and the magnitudes that it sums."""
    k = x.shape[-1]
    w = np.asarray(np.swapaxes(w, -1, -2) if transpose_w else w, np.int64)
    group = np.arange(k) // (group_size or max(k, 1))
    z = 0 if zero is None else np.asarray(zero, np.int64)[..., group, :]
    decoded = (w - z) * np.asarray(w_scale, np.float64)[..., group, :]
    rows = np.asarray(x, np.int64) * np.asarray(x_scale, np.float64)
    return rows @ decoded, np.abs(rows) @ np.abs(decoded)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize(
    ("lead", "batched", "k", "group_size"),
    [
        ((), False, 33, None),
        ((), False, 33, 8),  # four groups and one left over
        ((2,), False, 32, 8),
        ((2,), True, 20, 7),
        ((2,), True, 7, 8),  # one group that is not full
    ],
)
def test_scales_zero_points_and_groups(
    lead, batched, k, group_size, has_zero, transpose_w, implementation
):
    m, n = 9, 5
    groups = 1 if group_size is None else -(-k // group_size)
    w_lead = lead if batched else ()
    x, w = int8(*lead, m, k), int8(*w_lead, *((n, k) if transpose_w else (k, n)), seed=1)
    rng = np.random.default_rng(2)
    x_scale = rng.uniform(0.5, 2, (*lead, m, 1)).astype(np.float32)
    w_scale = rng.uniform(0.5, 2, (*w_lead, groups, n)).astype(np.float32)
    zero = int8(*w_lead, groups, n, seed=3) if has_zero else None

    @jax.jit
    def run(x, w, x_scale, w_scale, zero):
        return int8_matmul(
            x,
            w,
            x_scale=x_scale,
            w_scale=w_scale,
            w_zero_point=zero,
            group_size=group_size,
            transpose_w=transpose_w,
            implementation=implementation,
        )

    got = run(x, w, x_scale, w_scale, zero)
    want, size = scaled(x, w, x_scale, w_scale, zero, group_size, transpose_w)
    # The integers are exact; the sums of the groups are rounded, and so are the scales.
    assert_sums(got, want, size, groups)
    assert got.dtype == jnp.float32


def test_one_scale_for_all_rows_and_a_dtype_for_the_result():
    x, w = int8(9, 16), int8(16, 4, seed=1)
    got = int8_matmul(x, w, x_scale=jnp.float32(0.25), dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(exact(x, w) * 0.25, jnp.bfloat16))


def test_a_single_scale_for_the_whole_weight():
    x, w = int8(9, 16), int8(16, 4, seed=1)
    got = int8_matmul(x, w, w_scale=np.full((1, 1), 0.5, np.float32))
    np.testing.assert_array_equal(got, np.float32(exact(x, w) * 0.5))


X, W = np.zeros((9, 16), np.int8), np.zeros((16, 4), np.int8)
SCALE = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "takes int8; x is float32", (np.float32(X), W), {}),
        (TypeError, "takes int8; w is uint8", (X, np.uint8(W)), {}),
        (ValueError, r"expected x\[..., m, k\] and w\[..., k, n\]; got shapes", (X, X), {}),
        (ValueError, r"expected x\[..., m, k\] and w\[k, n\]; got", (X[0], W), {}),
        (ValueError, r"and w\[..., n, k\]", (X, W), dict(transpose_w=True)),
        (ValueError, "got shapes", (X[None], np.zeros((2, 16, 4), np.int8)), {}),
        (ValueError, "group_size needs a w_scale", (X, W), dict(group_size=8)),
        (ValueError, "group_size must be positive; got 0", (X, W), dict(group_size=0)),
        (
            ValueError,
            r"expected w_scale of the shape \(2, 4\), with 1 for what is shared; got \(3, 4\)",
            (X, W),
            dict(w_scale=np.ones((3, 4), np.float32), group_size=8),
        ),
        # Nine rows of scales are not taken for the scales of nine rows of x.
        (ValueError, r"expected w_scale", (X, W), dict(w_scale=np.ones((9, 4), np.float32))),
        (ValueError, r"got \(4,\)", (X, W), dict(w_scale=np.ones(4, np.float32))),
        (
            ValueError,
            r"expected w_zero_point of the shape \(1, 4\)",
            (X, W),
            dict(w_scale=SCALE, w_zero_point=np.zeros((2, 4), np.int8)),
        ),
        (TypeError, "w_zero_point is float32", (X, W), dict(w_scale=SCALE, w_zero_point=SCALE)),
        (
            ValueError,
            "no implementation 'fast' of this op; there are 'cpu', 'xla', 'pallas_tpu', 'triton', "
            "'pallas_gpu'",
            (X, W),
            dict(implementation="fast"),
        ),
    ],
)
def test_what_it_cannot_do_is_said(error, message, args, options):
    with pytest.raises(error, match=message):
        int8_matmul(*args, **options)


@pytest.mark.parametrize(
    ("chip", "version", "group", "reason"),
    [
        ("9.0", (0, 10, 2), None, None),
        ("10.0", (0, 10, 2), None, None),
        ("12.0", (0, 10, 2), None, "for NVIDIA's 9.0 and 10.0; 12.0 is at hand"),
        (None, (0, 10, 2), None, "no such chip is at hand"),
        ("9.0", (0, 12, 0), None, "compiled with jax 0.10 in the checks"),
        ("9.0", (0, 10, 2), 64, "not groups of 64"),
    ],
)
def test_mosaic_is_taken_by_name_alone(chip, version, group, reason, monkeypatch):
    monkeypatch.setattr(_int8_matmul, "chip", lambda platform: chip)
    monkeypatch.setattr(jax, "__version_info__", version)
    [mosaic] = [i for i in _int8_matmul.table() if i.name == "pallas_gpu"]
    problem = Problem(m=16, k=1024, n=1024, group_size=group)
    said = mosaic.refuses(problem, "cuda")
    assert said is None if reason is None else reason in said
    assert mosaic.defers(problem, "cuda") == "no device has run it"
    assert "for NVIDIA's" in mosaic.refuses(problem, "tpu")
    assert mosaic.blocks(problem, "cuda").startswith("tiles of 64 x 256 x 128, 3 slots")


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_a_bias_an_activation_and_codes_for_the_next_product(activation):
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((2, 3, 40), (40, 5)))
    scale, bias = np.full((1, 5), 1e-4, np.float32), rng.normal(size=(1, 5)).astype(np.float32)
    run = lambda scale, bias, **options: jc.ops.int8_matmul(
        x, w, w_scale=scale, bias=bias, activation=activation, **options
    )
    sums = x.astype(np.float64) @ w.astype(np.float64)
    before = sums * scale + bias
    slope = {
        None: lambda v: np.ones_like(v),
        "relu": lambda v: (v > 0).astype(float),
        "gelu": lambda v: (gelu(v + 1e-6) - gelu(v - 1e-6)) / 2e-6,
        "silu": lambda v: (silu(v + 1e-6) - silu(v - 1e-6)) / 2e-6,
    }
    follows = {None: lambda v: v, "relu": lambda v: np.maximum(v, 0), "gelu": gelu, "silu": silu}
    want = follows[activation](before)
    y, back = jax.vjp(run, scale, bias)
    # A few roundings of numbers below 100, and exp.
    np.testing.assert_allclose(y, want, atol=2e-5, rtol=1e-5)
    dscale, dbias = back(jnp.ones_like(y))
    d = slope[activation](before)
    np.testing.assert_allclose(dbias, d.sum((0, 1))[None], atol=1e-4)
    np.testing.assert_allclose(dscale, (d * sums).sum((0, 1))[None], rtol=1e-4)
    codes = run(scale, bias, out_scale=np.full((1, 1), 0.02, np.float32))
    assert codes.dtype == jnp.int8
    assert np.all(np.abs(codes - np.clip(want / 0.02, -127, 127)) <= 0.5 + 1e-2)
    assert np.abs(np.asarray(codes, int)).max() == 127


def gelu(v):
    return v / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))


def silu(v):
    return v / (1 + np.exp(-v))


def test_an_activation_that_there_is_not_and_a_bias_of_another_shape():
    x = np.ones((2, 4), np.int8)
    with pytest.raises(ValueError, match="'relu', 'gelu', 'silu', or None; got 'tanh'"):
        jc.ops.int8_matmul(x, x.T, activation="tanh")
    with pytest.raises(ValueError, match=r"expected bias of the shape \(1, 2\).*got \(2,\)"):
        jc.ops.int8_matmul(x, x.T, bias=np.ones(2, np.float32))
