"""The native CPU kernels: the same integers, and the same floats, on every path."""

import functools
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
from checks import assert_einsum, made, random
from jaxcompress.arrays._prepacked import prepack_array
from jaxcompress.arrays._qtype import Activation, IntType
from jaxcompress.arrays._quantized import replace
from jaxcompress.kernels import cpu

# Those that this machine can run; none without a compiler.
PATHS = [
    name
    for name in cpu.PATHS
    if cpu.missing() is None and cpu.library().jaxcompress_path(name.encode())
]
every_path = pytest.mark.parametrize("path", PATHS)
A8 = Activation(IntType(8))


def on(monkeypatch, path, fn, *args):
    """`fn` on a path: it is chosen when a function is traced, so it is traced anew."""
    monkeypatch.setenv(cpu.PATH_VARIABLE, path)
    return np.asarray(jax.jit(lambda *a: fn(*a))(*args))


def int8(*shape, seed=0):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def linear(q, x):
    return jc.accelerate(lambda q, x: x @ q)(q, x)


@every_path
@given(
    m=st.sampled_from([1, 2, 5, 6, 7, 13, 97]),
    k=st.sampled_from([0, 1, 3, 4, 63, 64, 65, 300]),
    n=st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130]),
    transpose_w=st.booleans(),
    seed=st.integers(0, 9),
)
def test_integers_are_those_of_numpy(path, m, k, n, transpose_w, seed):
    x, w = int8(m, k, seed=seed), int8(*((n, k) if transpose_w else (k, n)), seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        fn = functools.partial(jc.ops.int8_matmul, transpose_w=transpose_w, implementation="cpu")
        got = on(patch, path, fn, x, w)
    w = w.T if transpose_w else w
    np.testing.assert_array_equal(got, x.astype(np.int64) @ w.astype(np.int64))


@every_path
def test_the_largest_products(path, monkeypatch):
    """255 * 128 twice is more than 16 bits hold: what saturates would show here."""
    for a in (-128, 127):
        for b in (-128, 127):
            x, w = np.full((2, 131_071), a, np.int8), np.full((131_071, 17), b, np.int8)
            fn = functools.partial(jc.ops.int8_matmul, implementation="cpu")
            assert np.all(on(monkeypatch, path, fn, x, w).astype(np.int64) == a * b * 131_071)


FORMATS = [
    # bits, group size, symmetric, quantized activations
    (8, None, True, True),
    (8, 32, True, True),
    (8, 20, False, True),
    (8, None, False, False),
    (4, None, True, True),
    (4, 64, True, True),
    (4, 32, False, False),
    (4, 100, True, False),
    (3, 64, True, False),
    (2, 16, True, True),
    (5, None, True, False),
    (6, 12, True, True),
    (7, None, False, True),
]


@pytest.mark.parametrize(("bits", "group", "symmetric", "quantized"), FORMATS)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 200, 70), (9, 130, 16)])
def test_every_path_and_layout_gives_the_same_floats(
    bits, group, symmetric, quantized, m, k, n, monkeypatch
):
    q = made((k, n), (-2,), group and (group,), bits, symmetric)
    q = replace(q, act=A8) if quantized else q
    p, x = prepack_array(q), random(m, k)
    turned = p.transposed().canonical()
    from_columns = jc.accelerate(lambda q, x: x @ q.T)
    got = [on(monkeypatch, path, linear, w, x) for path in PATHS for w in (q, p)]
    got += [on(monkeypatch, path, from_columns, turned, x) for path in PATHS]
    assert got or cpu.missing()
    for other in got:
        np.testing.assert_array_equal(other, got[0])
        assert_einsum(other, "mk,kn->mn", x, q)


@every_path
def test_codes_of_activations_are_those_of_the_reference(path, monkeypatch):
    """A weight of ones shows the sum of a row's codes; ties go to even, everywhere."""
    q = made((96, 16))
    ones = np.ones((96, 16), np.int8)
    q = replace(q, values=ones, scale=np.ones((1, 16), np.float32), act=A8)
    x = np.clip(np.round(random(40, 96) * 100), -253, 253).astype(np.float32) / 2
    x[:, 0] = 127
    scale = np.float32(127) * np.float32(1 / 127)
    want = np.float32(np.rint(x / scale).sum(1)) * scale
    got = on(monkeypatch, path, linear, q, x)
    np.testing.assert_array_equal(got, np.broadcast_to(want[:, None], got.shape))


@every_path
@pytest.mark.parametrize("act", [A8, None])
def test_rows_that_are_not_finite_are_nan_and_leave_the_others_alone(path, act, monkeypatch):
    q = prepack_array(replace(made((70, 33)), act=act))
    x = random(5, 70)
    x[1, 3], x[3, 69] = np.nan, -np.inf
    got = on(monkeypatch, path, linear, q, x)
    assert np.isnan(got[[1, 3]]).all()
    np.testing.assert_array_equal(got[[0, 2, 4]], on(monkeypatch, path, linear, q, x[[0, 2, 4]]))


def test_zero_rows_and_denormals():
    if PATHS:
        q = prepack_array(replace(made((70, 33)), act=A8))
        x = np.zeros((2, 70), np.float32)
        x[1] = 1e-42
        np.testing.assert_array_equal(jax.jit(linear)(q, x), np.zeros((2, 33), np.float32))


def test_many_calls_at_once():
    """From several threads, each of which shares XLA's pool: nothing waits for ever."""
    q = prepack_array(replace(made((256, 512)), act=A8))
    x = random(64, 256)
    fn = jax.jit(lambda q, x: jax.lax.scan(lambda c, _: (c, linear(q, c).sum()), x, length=20)[1])
    want, got = np.asarray(fn(q, x)), [None] * 4

    def work(i):
        got[i] = np.asarray(fn(q, x))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in got:
        np.testing.assert_array_equal(other, want)


def test_a_path_that_is_not_there_is_said(monkeypatch):
    if PATHS:
        monkeypatch.setenv(cpu.PATH_VARIABLE, "neon")
        with pytest.raises(ValueError, match=r"'neon': this CPU has the paths .*portable"):
            jc.ops.int8_matmul(int8(2, 8), int8(8, 2), implementation="cpu")


def raw(x, w, *, out=(1, 2, 3), scratch=4096, layout=1, path="", **operands):
    """The foreign function itself, with nothing checked before."""
    integers = not operands
    shapes = (
        jax.ShapeDtypeStruct(out, jnp.int32 if integers else jnp.float32),
        jax.ShapeDtypeStruct((scratch,), jnp.uint8),
    )
    name = "jaxcompress_int8_matmul" if integers else "jaxcompress_quantized_matmul"
    static = dict(layout=np.int64(layout), path=path)
    if not integers:
        numbers = dict(bits=8, group_size=8, digits=1, high=127, activation=0)
        numbers |= operands.pop("numbers", {})
        static |= {k: np.int64(v) for k, v in numbers.items()}
    return jax.ffi.ffi_call(name, shapes)(x, w, *operands.values(), **static)


X, W = np.zeros((1, 2, 8), np.int8), np.zeros((1, 8, 3), np.int8)
NONE = np.zeros(0, np.float32)
F = dict(scale=np.ones((1, 1, 3), np.float32), zero=np.zeros(0, np.int8), given=NONE)
F |= dict(bias=NONE, residual=NONE)


@pytest.mark.parametrize(
    ("message", "args", "options"),
    [
        ("the weights take 21 bytes, not 24", (X, W[:, :7]), {}),
        ("the weights take 24 bytes, not 128", (X, W), dict(layout=0)),
        ("there is no such layout", (X, W), dict(layout=3)),
        ("differ in b or m", (X, W), dict(out=(1, 3, 3))),
        ("expected x.b, m, k.", (X[0], W), {}),
        ("the weights are no bytes", (X, np.float32(W)), {}),
        ("the scratch buffer is too small", (X, W), dict(scratch=16)),
        ("this CPU has no path sve", (X, W), dict(path="sve")),
        ("Wrong buffer dtype", (np.float32(X), W), {}),
        ("expected a scale a group", (np.float32(X), W), F | dict(scale=np.ones(2, np.float32))),
        ("expected a zero point a scale", (np.float32(X), W), F | dict(zero=np.zeros(2, np.int8))),
        ("an activation scale a batch", (np.float32(X), W), F | dict(given=np.ones(2, np.float32))),
        ("a multiple of 4 codes", (np.float32(X), W), F | dict(numbers=dict(group_size=6))),
        ("codes have 2 to 8 bits", (np.float32(X), W), F | dict(numbers=dict(bits=9))),
        ("1, 3 or 4 digits", (np.float32(X), W), F | dict(numbers=dict(digits=2))),
        ("a scale a row of codes", (X, W), F),
        ("expected a bias a column", (np.float32(X), W), F | dict(bias=np.ones(2, np.float32))),
        ("not of the result's shape", (np.float32(X), W), F | dict(residual=np.float32(X))),
        ("no such activation", (np.float32(X), W), F | dict(numbers=dict(activation=5))),
        ("is 1 to 127", (np.float32(X), W), F | dict(numbers=dict(high=128))),
    ],
)
def test_the_native_side_returns_an_error(message, args, options):
    if PATHS:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(jax.jit(functools.partial(raw, **options))(*args))


def test_a_library_of_another_version_is_named():
    """In a process of its own: what is loaded stays loaded."""
    code = "from jaxcompress.kernels import cpu; cpu.TARGETS = ('nothing',); print(cpu.missing())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("another version" in said.stdout) == (cpu.missing() is None)
