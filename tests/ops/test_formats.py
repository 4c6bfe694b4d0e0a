"""Products, views, files and training of the formats that are no plain integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import quantized, random
from jaxcompress.arrays import Activation, OddType
from jaxcompress.quantize import Spec

SPECS = {
    "binary": jc.quantize.binary(),
    "ternary": jc.quantize.ternary(),
    "odd3": Spec(qtype=OddType(3)),
    "odd8": Spec(qtype=OddType(8)),
    "nf4": jc.quantize.nf4(),
    "fp8_e4m3": jc.quantize.fp8_e4m3(),
    "mxfp4": jc.quantize.mxfp4(),
    "nvfp4": jc.quantize.nvfp4(),
}
ACT = jc.quantize.w8a8().act


def matmul(p, x):
    return x @ p["w"]


def dense(q):
    return np.asarray(q.materialise(), np.float64)


def assert_near(got, want, size):
    # A float32 sum of at most 200 terms: 200 roundings of 2^-24 of the magnitudes.
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= 200 * 2.0**-24 * size + 1e-30)


@pytest.mark.parametrize("name", SPECS)
def test_a_product_is_that_of_the_decoded_weight(name):
    w, x = random(130, 6), random(4, 130, seed=1)
    q = quantized(w, SPECS[name])
    got = jax.jit(jc.accelerate(matmul))({"w": q}, x)
    assert_near(got, x @ dense(q), np.abs(x) @ np.abs(dense(q)))
    # Twins see what is stored, and gradients reach the activations.
    twin = jc.quantize.prepare_qat({"w": jnp.asarray(w)}, {"w": SPECS[name]})
    np.testing.assert_array_equal(twin["w"].materialise(), q.materialise())
    simulated = jax.jit(jc.accelerate(matmul))(twin, x)
    assert_near(simulated, x @ dense(q), np.abs(x) @ np.abs(dense(q)))
    grad = jax.grad(lambda x: jc.accelerate(matmul)({"w": q}, x).sum())(jnp.asarray(x))
    assert_near(grad, np.ones((4, 6)) @ dense(q).T, np.ones((4, 6)) @ np.abs(dense(q)).T)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_explain_says_what_runs_as_integers(platform):
    x = jnp.ones((32, 128))
    for name in ("binary", "odd8", "nf4", "nvfp4"):
        spec = SPECS[name]
        q = quantized(random(128, 8), spec)
        [row] = jc.explain(matmul, {"w": q}, x, platform=platform)
        assert row.op == "quantized_matmul"
        assert row.nbytes == q.nbytes  # of the leaf as it is stored
        floats = not spec.qtype.integer
        assert (row.why == f"a float product of the decoded {spec.qtype.name}") == floats, name
        both = Spec(qtype=spec.qtype, group_size=spec.group_size, act=ACT)
        [row] = jc.explain(matmul, {"w": quantized(random(128, 8), both)}, x, platform=platform)
        assert row.op == ("quantized_matmul" if floats else "int8_matmul"), name


@pytest.mark.parametrize("name", ["binary", "ternary", "odd3"])
def test_integers_times_integers_are_exact(name):
    """Activations in eight bits: int32 sums, and training agrees."""
    spec = Spec(qtype=SPECS[name].qtype, act=ACT)
    w, x = random(70, 5), random(9, 70, seed=1)
    q = quantized(w, spec)
    got = np.asarray(jax.jit(jc.accelerate(matmul))({"w": q}, x))
    scale = np.abs(x).max(1, keepdims=True) * np.float32(1 / 127)
    codes = np.rint(x / scale).astype(np.int64)
    sums = codes @ np.rint(dense(q) / np.asarray(q.scale, np.float64)).astype(np.int64)
    want = sums.astype(np.float32) * scale * np.asarray(q.scale)
    np.testing.assert_allclose(got, want, rtol=3e-7)  # two scales, a rounding each
    twin = jc.quantize.prepare_qat({"w": jnp.asarray(w)}, {"w": spec})
    # The same sums; the mean that is the scale may round otherwise in another program.
    np.testing.assert_allclose(jax.jit(jc.accelerate(matmul))(twin, x), got, rtol=5e-7)


def test_float_activations_of_eight_bits():
    """Weights and activations in fp8: the product of the rounded numbers."""
    import ml_dtypes

    kind = jc.quantize.fp8_e4m3().qtype
    spec = Spec(qtype=kind, act=jc.arrays.Activation(kind))
    w, x = random(70, 5), random(9, 70, seed=1)
    q = quantized(w, spec)
    scale = np.abs(x).max(1, keepdims=True) * np.float32(1 / 448)
    seen = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    got = jax.jit(jc.accelerate(matmul))({"w": q}, x)
    assert_near(got, seen @ dense(q), np.abs(seen) @ np.abs(dense(q)))
    grads = jax.grad(lambda x: jc.accelerate(matmul)({"w": q}, x).sum())(jnp.asarray(x))
    # Through the rounding: that of a product with the weight, which rounds to float32.
    assert_near(grads, np.ones((9, 5)) @ dense(q).T, np.ones((9, 5)) @ np.abs(dense(q)).T)
    [row] = jc.explain(matmul, {"w": q}, x)
    assert (row.op, row.implementation) == ("scaled_matmul", "reference")
    assert "not xla: cpu has no unit for floats of eight bits" in row.why
    twin = jc.quantize.prepare_qat({"w": jnp.asarray(w)}, {"w": spec})
    np.testing.assert_array_equal(jax.jit(jc.accelerate(matmul))(twin, x), got)


def in_blocks(x):
    """`x` in MX's eight-bit floats, 32 neighbours of the last axis after another; what fits."""
    import ml_dtypes

    out, fits = np.zeros(x.shape, np.float64), np.zeros(x.shape, bool)
    for start in range(0, x.shape[-1], 32):
        part = x[..., start : start + 32].astype(np.float64)
        largest = np.abs(part).max(-1, keepdims=True)
        scale = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 256.0))) - 8)
        numbers = np.clip(part / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        out[..., start : start + 32] = numbers.astype(np.float64) * scale
        fits[..., start : start + 32] = np.abs(part / scale) <= 448
    return out, fits


@pytest.mark.parametrize(
    ("w_shape", "x_shape", "axis"),
    [((70, 5), (9, 70), -2), ((5, 96), (2, 3, 96), -1), ((2, 20, 5), (2, 9, 20), -2)],
    ids=["rows", "turned", "one block, matrices"],
)
def test_blocks_of_eight_bit_floats_on_both_sides(w_shape, x_shape, axis):
    w, x = random(*w_shape), random(*x_shape, seed=1)
    x[..., :3] *= 1000  # one block far above the others
    x[..., 0, :] = 0
    fn = (lambda p, x: x @ p["w"].T) if axis == -1 else matmul
    spec = jc.quantize.mxfp8(axis=axis, activations=True)
    q = quantized(w, spec)
    stored = dense(q)
    columns = np.swapaxes(stored, -1, -2) if axis == -1 else stored
    turned = np.swapaxes(columns, -1, -2)
    want, _ = in_blocks(w if axis == -1 else np.swapaxes(w, -1, -2))
    np.testing.assert_array_equal(turned, want)
    seen, fits = in_blocks(x)
    got = jax.jit(jc.accelerate(fn))({"w": q}, x)
    assert_near(got, seen @ columns, np.abs(seen) @ np.abs(columns))
    # Through the rounding, but for what saturates.
    grads = jax.grad(lambda x: jc.accelerate(fn)({"w": q}, x).sum())(jnp.asarray(x))
    ones = np.ones(got.shape)
    assert not fits.all()
    assert_near(grads, np.where(fits, ones @ turned, 0), ones @ np.abs(turned))
    twin = jc.quantize.prepare_qat({"w": jnp.asarray(w)}, {"w": spec})
    simulated = jax.jit(jc.accelerate(fn))(twin, x)
    assert_near(simulated, seen @ columns, np.abs(seen) @ np.abs(columns))
    for platform, name in (("cpu", "reference"), ("tpu", "reference")):
        [row] = jc.explain(fn, {"w": q}, x, platform=platform)
        assert (row.op, row.implementation) == ("scaled_matmul", name)


def test_activations_in_blocks_meet_any_weight_and_have_scales_of_their_own():
    kind, x = jc.quantize.mxfp8().qtype, random(9, 70, seed=1)
    q = quantized(random(70, 5), Spec(qtype=jc.quantize.int8().qtype, act=Activation(kind)))
    got, (seen, _) = jax.jit(jc.accelerate(matmul))({"w": q}, x), in_blocks(x)
    assert_near(got, seen @ dense(q), np.abs(seen) @ np.abs(dense(q)))
    for options in (dict(static=True, per_token=False), dict(per_token=False)):
        with pytest.raises(ValueError, match="for 32 of a token; got float8_e4m3"):
            Activation(kind, **options)
    with pytest.raises(ValueError, match="scales_e4m3, static=False"):
        Activation(jc.quantize.nvfp4().qtype)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_blocks_of_an_image_are_features_of_a_pixel(layout):
    kind, image = jc.quantize.mxfp8().qtype, random(2, 5, 6, 40, seed=1)
    spec = Spec(qtype=jc.quantize.int8().qtype, axis=(0, 1, 2), act=Activation(kind))
    q = quantized(random(3, 3, 40, 4), spec)
    turned = lambda x: jnp.moveaxis(x, -1, layout.index("C"))
    conv = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=(layout, "HWIO", "NHWC")
    )
    seen, _ = in_blocks(image.reshape(-1, 40))
    want = conv(q.materialise(), turned(jnp.asarray(seen.reshape(image.shape), jnp.float32)))
    got = jax.jit(jc.accelerate(conv))(q, turned(jnp.asarray(image)))
    np.testing.assert_allclose(got, want, atol=1e-4)  # sums of 360 floats of size 1


VIEWS = {
    "transpose": lambda w: w.T,
    "rows": lambda w: w[2:5],
    "columns": lambda w: w[:, 64:],
    "half a group": lambda w: w[:, 8:40],
    "reshape": lambda w: w.reshape(2, 3, 96),
    "merged groups": lambda w: w.reshape(-1),
    "lookup": lambda w: jnp.take(w, jnp.array([4, 0, 4]), axis=0),
    "joined": lambda w: jnp.concatenate([w, w[:2]], 0),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_every_format(view):
    w = jnp.asarray(random(6, 96))
    for name in ("binary", "nf4", "nvfp4"):
        spec = SPECS[name]
        q = quantized(w, Spec(qtype=spec.qtype, axis=-1, group_size=spec.group_size))
        got = jax.jit(jc.accelerate(lambda p: VIEWS[view](p["w"]) * 1.0))({"w": q})
        want = VIEWS[view](q.materialise())
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_layers_under_scan_experts_and_convolutions():
    w, x = random(3, 64, 64), random(5, 64, seed=1)
    kernel, image = random(3, 3, 32, 4), random(1, 5, 5, 32, seed=1)
    scan = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    experts = lambda p, x: jnp.einsum("bk,ekn->ebn", x, p["w"])
    for name in ("binary", "nvfp4"):
        q = {"w": quantized(w, SPECS[name])}
        full = {"w": q["w"].materialise()}
        for fn in (scan, experts):
            rows = jc.explain(fn, q, x)
            assert not rows.materialised, f"{name}\n{rows}"
            # Sums of 64 numbers in another order, through three layers at most.
            np.testing.assert_allclose(
                jax.jit(jc.accelerate(fn))(q, x), jax.jit(fn)(full, x), atol=2e-5
            )
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for name in ("binary", "fp8_e4m3"):
        q = {"w": quantized(kernel, Spec(qtype=SPECS[name].qtype, axis=(0, 1, 2)))}
        [row] = jc.explain(conv, q, image)
        assert row.op == "convolution"
        want = conv({"w": q["w"].materialise()}, image)
        np.testing.assert_allclose(jax.jit(jc.accelerate(conv))(q, image), want, atol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_files_have_the_same_bits(name, tmp_path):
    params = {"w": quantized(random(70, 6), SPECS[name]), "b": jnp.ones(3)}
    jc.io.save(tmp_path / "m.safetensors", params)
    again = jc.io.load(tmp_path / "m.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_gradients_of_signs_pass_everywhere():
    """A weight far beyond the scale still moves; the scale is a constant."""
    w = jnp.array([[0.1], [-5.0], [0.5], [2.0]])
    c = jnp.arange(1.0, 5.0)[:, None]
    for name in ("binary", "ternary"):
        twin = jc.quantize.prepare_qat({"w": w}, {"w": SPECS[name]})["w"]
        grad = jax.grad(lambda t: jnp.sum(c * t.materialise()))(twin).weight
        np.testing.assert_allclose(grad, c, rtol=1e-6)


def test_sparse_arrays_hold_integers():
    params = jc.quantize.prepare_qat({"w": jnp.eye(4)}, {"w": SPECS["nf4"]})
    with pytest.raises(TypeError, match="sparse arrays hold integers; 'w' is nf4"):
        jc.prune.pack(params, {"w": jnp.eye(4) > 0})
