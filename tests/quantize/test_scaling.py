"""AWQ and SmoothQuant: exact before rounding, better after it, and on the integer path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import assert_compressed, random, run
from jaxcompress.arrays import ScaledArray

model = lambda p, x: x @ p["w"]
FINE = jc.quantize.Spec(qtype=jc.arrays.IntType(8))


def outliers(m, k, seed=0):
    x = random(m, k, seed=seed)
    x[:, 3] *= 50
    return x


def inputs():
    return outliers(64, 24), random(24, 8, seed=1)


@pytest.mark.parametrize("method", [jc.quantize.awq, jc.quantize.smoothquant])
def test_scaling_itself_changes_nothing(method):
    """What is stored, codes and both scales, is the weight up to half a step: no more."""
    x, w = inputs()
    q = method(model, {"w": jnp.asarray(w)}, [x], {"w": FINE})["w"]
    assert isinstance(q, ScaledArray)
    scale = np.asarray(q.scale, np.float64)
    assert scale.shape == (24, 1)
    assert scale.min() < scale.max()
    inside = np.abs(w / scale - oracles.dense(q.array))
    if method is jc.quantize.smoothquant:  # awq may clip
        assert np.all(inside <= np.asarray(q.array.scale) / 2 * (1 + 1e-4))
    np.testing.assert_allclose(q.materialise(), oracles.dense(q.array) * scale, rtol=1e-6)


def test_smoothquant_is_the_formula():
    x, w = inputs()
    q = jc.quantize.smoothquant(
        model, {"w": jnp.asarray(w)}, [x[:32], x[32:]], {"w": jc.quantize.w8a8()}, strength=0.7
    )["w"]
    smooth = np.abs(x).max(0) ** 0.7 / np.abs(w).max(1) ** 0.3
    np.testing.assert_allclose(1 / np.asarray(q.scale)[:, 0], smooth, rtol=1e-5)
    scaled = w * smooth[:, None]
    np.testing.assert_allclose(q.array.scale[0], np.abs(scaled).max(0) / 127, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_smoothquant_runs_as_integers_and_helps(static):
    x, w = inputs()
    params, rules = {"w": jnp.asarray(w)}, {"w": jc.quantize.w8a8(static=static)}
    q = jc.quantize.smoothquant(model, params, [x], rules)
    out, rows = run(model, q, jnp.asarray(x))
    assert_compressed(rows, "int8_matmul")
    small = np.asarray(x * np.asarray(q["w"].scale)[:, 0], np.float32)
    act = q["w"].array.act_scale
    assert (act is not None) == static
    if static:
        np.testing.assert_allclose(act, np.abs(small).max() / 127, rtol=1e-5)
    seen = oracles.activations(small, scale=act)
    # A product of x and 1/s may round the other way in the compiled program: one code of 127.
    want = seen @ oracles.dense(q["w"].array)
    size = np.abs(seen) @ np.abs(oracles.dense(q["w"].array))
    assert np.all(np.abs(out - want) <= size / 127 / 4)
    exact = x.astype(np.float64) @ w
    stats = jc.calibrate(model, params, [x], jc.statistics.absmax()) if static else None
    plain = jc.accelerate(model)(jc.quantize.quantize(params, rules, stats=stats), x)
    assert np.linalg.norm(out - exact) < 0.5 * np.linalg.norm(plain - exact)


def test_awq_takes_the_exponent_of_least_error():
    x, w = inputs()
    spec = jc.quantize.int3()
    q = jc.quantize.awq(model, {"w": jnp.asarray(w)}, [x], {"w": spec}, clip=False)["w"]
    rms = np.sqrt((x.astype(np.float64) ** 2).sum(0))

    def error(s):
        scaled = w * s[:, None]
        step = np.abs(scaled).max(0) / 3
        back = np.rint(scaled / step) * step / s[:, None]
        return np.linalg.norm(x @ (back - w))

    smooth = [rms**a / np.sqrt((rms**a).max() * (rms**a).min()) for a in np.arange(20) / 20]
    errors = [error(s) for s in smooth]
    best = int(np.argmin(errors))
    assert best > 0
    np.testing.assert_allclose(1 / np.asarray(q.scale)[:, 0], smooth[best], rtol=1e-4)
    assert np.linalg.norm(x @ (oracles.dense(q.array) * q.scale - w)) <= errors[0]


def test_scaled_arrays_in_every_place():
    """Attention, a transposed weight, experts, a scan, bfloat16; nothing is decoded."""
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    x = jnp.asarray(random(4, 12, 8))

    def fn(p, x):
        x = attention.apply(p["a"], x, x)
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, p["stack"])
        x = jnp.einsum("bld,edf->eblf", x, p["experts"])
        return x.astype(jnp.bfloat16) @ p["last"].astype(jnp.bfloat16)

    params = {
        "a": attention.init(jax.random.key(0), x, x),
        "stack": jnp.asarray(random(2, 8, 8, seed=1)),
        "experts": jnp.asarray(random(3, 8, 6, seed=2)),
        "last": jnp.asarray(random(6, 5, seed=3)),
    }
    rules = {".*kernel|stack|experts|last": jc.quantize.int8()}
    q = jc.quantize.smoothquant(fn, params, [x], rules)
    out, rows = run(fn, q, x)
    assert not rows.materialised, f"\n{rows.materialised}"
    dense = jax.tree.map(
        lambda w: w.materialise() if jc.arrays.is_compressed(w) else w,
        q,
        is_leaf=jc.arrays.is_compressed,
    )
    # Two bfloat16 results of sums of six terms: eight bits of mantissa.
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(fn(dense, x), np.float32), atol=0.05, rtol=0.02
    )


def test_other_uses_decode_and_say_so():
    x, w = inputs()
    q = jc.quantize.smoothquant(model, {"w": jnp.asarray(w)}, [x], {"w": FINE})
    out, rows = run(lambda p: jnp.abs(p["w"]).sum(0), q)
    assert [row.primitive for row in rows.materialised] == ["abs"]
    np.testing.assert_allclose(out, np.abs(np.asarray(q["w"].materialise())).sum(0), rtol=1e-5)


def test_saved_and_loaded(tmp_path):
    x, w = inputs()
    q = jc.quantize.smoothquant(model, {"w": jnp.asarray(w)}, [x], {"w": jc.quantize.w4a8()})
    jc.io.save(tmp_path / "q", q)
    back = jc.io.load(tmp_path / "q")
    assert jax.tree.structure(back) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, back, q)


def test_wrong_use_raises():
    x, w = inputs()
    params = {"w": jnp.asarray(w)}
    static = {"w": jc.quantize.w8a8(static=True)}
    stats = jc.calibrate(model, params, [x], jc.statistics.absmax())
    with pytest.raises(ValueError, match="'w': static activation scales are those before"):
        jc.quantize.awq(model, params, [x], static, stats=stats)
    with pytest.raises(ValueError, match="strength is 0 to 1"):
        jc.quantize.smoothquant(model, params, [x], static, strength=2.0)
    x[0, 0] = np.nan
    for method in (jc.quantize.awq, jc.quantize.smoothquant):
        with pytest.raises(ValueError, match="of 'w' is not finite"):
            method(model, params, [x], {"w": FINE})


def test_features_that_are_never_active():
    x, w = inputs()
    x[:, 5] = 0
    for method in (jc.quantize.awq, jc.quantize.smoothquant):
        q = method(model, {"w": jnp.asarray(w)}, [x], {"w": FINE})["w"]
        assert np.isfinite(np.asarray(q.materialise())).all()
