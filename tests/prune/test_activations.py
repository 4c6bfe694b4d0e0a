"""Activation pruning: exact counts, the same through every product, and what it reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from checks import assert_model, random, run
from jaxcompress.arrays import PrunedInputArray

Sparse = jc.prune.ActivationSparsity
fn = lambda p, x: x @ p["w"]


def largest(x, sparsity, group=None):
    """Top-k by its definition: a stable sort of each group of each row."""
    out = np.zeros_like(x)
    if x.size == 0:
        return x
    for row, to in zip(x.reshape(-1, x.shape[-1]), out.reshape(-1, x.shape[-1])):
        size = group or len(row)
        for start in range(0, len(row), size):
            part = row[start : start + size]
            order = np.argsort(-np.abs(part), kind="stable")[: size - round(sparsity * size)]
            to[start + order] = part[order]
    return out


def wrapped(w, spec, **kwargs):
    return jc.prune.prune_activations({"w": w}, {"w": spec}, **kwargs)


@settings(max_examples=8)
@given(
    st.sampled_from([(1,), (7,), (2, 3, 8), (5, 0), (0, 4), (3, 33)]),
    st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    st.sampled_from([np.float32, np.float16, jnp.bfloat16]),
    st.integers(0, 9),
)
def test_top_k_keeps_the_largest_and_ties_go_down(shape, sparsity, dtype, seed):
    x = np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)  # ties are common
    got = jc.prune.top_k_activations(jnp.asarray(x), sparsity)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, largest(x, sparsity))


@pytest.mark.parametrize(("n", "m", "k"), [(1, 2, 7), (2, 4, 16), (3, 3, 4), (4, 16, 19)])
def test_n_of_m_in_every_group(n, m, k):
    x = np.random.default_rng(k).integers(-3, 4, (3, k)).astype(np.float32)
    got = jc.prune.nm_activations(jnp.asarray(x.T), n, m, axis=0).T
    np.testing.assert_array_equal(got, largest(x, 1 - n / m, m))


def test_gradients_pass_straight_through():
    x, g = jnp.asarray(random(3, 8)), jnp.asarray(random(3, 8, seed=1))
    for prune in (
        lambda x: jc.prune.top_k_activations(x, 0.5),
        lambda x: jc.prune.nm_activations(x, 2, 4),
        lambda x: jc.prune.threshold_activations(x, 0.7),
    ):
        _, back = jax.vjp(prune, x)
        np.testing.assert_array_equal(back(g)[0], g)
        np.testing.assert_array_equal(jax.jvp(prune, (x,), (g,))[1], g)


def test_what_is_not_finite_is_not_hidden():
    x = jnp.array([[1.0, jnp.nan, jnp.inf, 9.0]])
    for prune in (
        lambda x: jc.prune.top_k_activations(x, 0.5),
        lambda x: jc.prune.threshold_activations(x, 9.0),
    ):
        np.testing.assert_array_equal(prune(x), [[0, np.nan, np.inf, 0]])


PRODUCTS = {
    "plain": ("mk,kn->mn", (5, 8), (8, 3), (1,), (0,)),
    "weight first": ("kn,mk->nm", (5, 8), (8, 3), (1,), (0,)),
    "transposed": ("mk,nk->mn", (5, 8), (3, 8), (1,), (1,)),
    "experts": ("emk,ekn->emn", (2, 5, 8), (2, 8, 3), (2,), (1,)),
    "heads, turned": ("mdh,hdn->mn", (5, 4, 2), (2, 4, 3), (2, 1), (0, 1)),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("spec", [Sparse(0.5), Sparse(0.5, group_size=4)], ids=["top-k", "2:4"])
def test_every_product_prunes_what_it_contracts(name, spec):
    """Features are those that the product contracts, in the order in which the weight has them."""
    equation, xs, ws, x_contract, w_contract = PRODUCTS[name]
    x, w = random(*xs), random(*ws, seed=1)
    met = [a for _, a in sorted(zip(w_contract, x_contract))]
    order = [a for a in range(x.ndim) if a not in met] + met
    turned = x.transpose(order)
    flat = turned.reshape(*turned.shape[: x.ndim - len(met)], -1)
    kept = largest(flat, 0.5, spec.group_size).reshape(turned.shape).transpose(np.argsort(order))
    assert (kept == 0).mean() == 0.5
    weight_first = equation.startswith("kn")
    multiply = lambda p, x: jnp.einsum(equation, *((p["w"], x) if weight_first else (x, p["w"])))
    out, rows = run(multiply, wrapped(w, spec), x)
    assert {row.op for row in rows} == {"prune_activations"}
    assert_model(out, np.einsum(equation, *((w, kept) if weight_first else (kept, w))))


def test_a_pixel_of_a_convolution_is_a_token():
    x, w = random(2, 5, 5, 4), random(3, 3, 4, 6, seed=1)
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    out, _ = run(conv, wrapped(w, Sparse(0.5)), x)
    assert_model(out, conv({"w": w}, largest(x, 0.5)), steps=64)


def test_ragged_rows_and_lookups():
    x, w = random(6, 8), random(2, 8, 3, seed=1)
    ragged = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 4]))
    out, _ = run(ragged, wrapped(w, Sparse(0.75)), x)
    kept = largest(x, 0.75)
    assert_model(out, np.concatenate([kept[:2] @ w[0], kept[2:] @ w[1]]))
    table = lambda p, i: p["w"][i]
    out, _ = run(table, wrapped(w[0], Sparse(0.75)), jnp.array([3, 1]))
    np.testing.assert_array_equal(out, w[0][[3, 1]])


def test_activations_are_pruned_then_quantized():
    """A quantized weight within takes what is left: the same as pruning by hand before it."""
    x, w = random(5, 32), random(32, 6, seed=1)
    q = jc.quantize.quantize({"w": w}, {"w": jc.quantize.w8a8()})
    out, rows = run(fn, wrapped(q["w"], Sparse(0.5)), x)
    assert {row.op for row in rows} == {"prune_activations", "int8_matmul"}
    np.testing.assert_array_equal(out, jax.jit(jc.accelerate(fn))(q, largest(x, 0.5)))
    fast = jc.prepack(wrapped(q["w"], Sparse(0.5)))
    np.testing.assert_array_equal(jax.jit(jc.accelerate(fn))(fast, x), out)


def test_thresholds_are_quantiles_of_each_layer():
    """Under scan every layer has its own threshold; the share is that of the histogram's bin."""
    weights = jnp.asarray(np.stack([3.0 * np.eye(64), 0.1 * np.eye(64)]), jnp.float32)

    def stack(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]

    x = random(400, 64)
    stats = jc.calibrate(stack, {"w": weights}, [x[:200], x[200:]], jc.statistics.magnitudes())
    sparse = wrapped(weights, Sparse(0.4, static=True), stats=stats)
    want = [np.quantile(np.abs(x), 0.4), np.quantile(np.abs(3.0 * x), 0.4)]
    assert sparse["w"].threshold.shape == (2, 1, 1)
    # Linear within a bin that is 1/32 wide.
    np.testing.assert_allclose(sparse["w"].threshold[:, 0, 0], want, rtol=1 / 64)
    found = jc.prune.activation_sparsity(stack, sparse, [x])["w"]
    after = 3.0 * np.where(np.abs(x) > sparse["w"].threshold[0, 0, 0], x, 0)
    share = [(np.abs(x) <= sparse["w"].threshold[0, 0, 0]).mean()]
    share.append((np.abs(after) <= sparse["w"].threshold[1, 0, 0]).mean())
    np.testing.assert_allclose(found, share, atol=1e-6)  # a count of 25,600 in float32
    out = jax.jit(jc.accelerate(stack))(sparse, x)
    assert abs((np.asarray(out) == 0).mean() - 0.4) < 0.01  # a bin holds half of that


def test_every_expert_has_its_threshold():
    x, w = random(2, 5, 8), jnp.asarray(random(2, 8, 3, seed=1))
    pruning = Sparse(0.5, static=True)
    experts = {"w": PrunedInputArray(w, jnp.array([0.2, 1.0])[:, None, None], pruning=pruning)}
    kept = np.where(np.abs(x) > np.array([0.2, 1.0])[:, None, None], x, 0)
    out, rows = run(lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"]), experts, x)
    assert not rows.materialised
    assert_model(out, np.einsum("emk,ekn->emn", kept, w))


def test_sparsity_counts_the_zeros_of_relu_too():
    x, w = random(50, 6), random(6, 8, seed=1)
    model = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": jnp.asarray(w), "b": jnp.asarray(w.T), "c": jnp.zeros((2, 2))}
    pruned = jc.prune.prune_activations(params, {"b": Sparse(0.75)})
    for p, sparsity in ((params, 0.0), (pruned, 0.75)):
        found = jc.prune.activation_sparsity(model, p, [x[:20], x[20:]])
        inside = largest(np.maximum(x.astype(np.float64) @ w, 0), sparsity)
        np.testing.assert_allclose(found["b"], (inside == 0).mean(), atol=1e-6)
        assert found["a"] == 0
        assert found["c"] is None


def test_training_through_it():
    """The gradient of a weight is that of the pruned activations; thresholds stay."""
    x, w = random(20, 16), random(16, 3, seed=1)
    stats = jc.calibrate(fn, {"w": w}, [x], jc.statistics.magnitudes())
    params = wrapped(jnp.asarray(w), Sparse(0.5, static=True), stats=stats)
    kept = np.where(np.abs(x) > float(params["w"].threshold[0, 0]), x, 0)
    grads = jax.grad(lambda p: jc.accelerate(fn)(p, x).sum())(params)
    assert_model(grads["w"].array, np.repeat(kept.sum(0, dtype=np.float64)[:, None], 3, 1))
    labels = jc.quantize.trainable(params)
    tx = optax.multi_transform({"weight": optax.adamw(0.1), "frozen": jc.quantize.freeze()}, labels)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)["w"]
    assert new.threshold == params["w"].threshold
    assert (new.array != w).any()
    twin = jc.quantize.prepare_qat({"w": jnp.asarray(w)}, {"w": jc.quantize.w8a8()})
    twin = wrapped(twin["w"], Sparse(0.5))
    assert jc.quantize.trainable(twin)["w"].array.weight == "weight"
    q = jc.quantize.convert(twin)
    assert_model(jc.accelerate(fn)(q, x), jc.accelerate(fn)(twin, x))


def test_views_keep_it_and_other_primitives_say_so():
    x, w = random(5, 8), random(8, 4, seed=1)
    p = wrapped(jnp.asarray(w), Sparse(0.5))
    view = lambda p, x: x @ jnp.squeeze(p["w"].astype(jnp.float32)[None].reshape(1, 8, 4), 0)
    out, rows = run(view, p, x)
    assert not rows.materialised
    assert_model(out, largest(x, 0.5) @ w)
    [row] = jc.explain(lambda p: (p["w"] ** 2).sum(), p).materialised
    assert row.why == "no rule that prunes activations"
    two = lambda p, x: x @ (p["w"] @ p["w"].T)
    assert_model(run(two, p, x)[0], x @ (largest(w, 0.5) @ w.T), steps=64)


def test_files_hold_it(tmp_path):
    x, w = random(40, 8), jnp.asarray(random(8, 4, seed=1))
    stats = jc.calibrate(fn, {"w": w}, [x], jc.statistics.magnitudes())
    q = jc.quantize.quantize({"w": w}, {"w": jc.quantize.w4a8()})
    for inside, spec in ((w, Sparse(0.5, static=True)), (q["w"], Sparse(0.5, group_size=4))):
        tree = wrapped(inside, spec, stats=stats)
        jc.io.save(tmp_path / "file.safetensors", tree)
        back = jc.io.load(tmp_path / "file.safetensors")
        assert isinstance(back["w"], PrunedInputArray)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree)):
            np.testing.assert_array_equal(a, b)


def test_what_cannot_be_pruned_is_named():
    w = jnp.ones((8, 4))
    stats = jc.calibrate(fn, {"w": w}, [jnp.ones((2, 8))], jc.statistics.absmax())
    static = Sparse(0.5, static=True)
    with pytest.raises(ValueError, match="'w' is static and needs stats"):
        wrapped(w, static)
    with pytest.raises(ValueError, match=r"'w' has the shape .* jc\.statistics.magnitudes"):
        wrapped(w, static, stats=stats)
    bad = jnp.ones((2, 8)).at[0, 0].set(jnp.inf)
    stats = jc.calibrate(fn, {"w": w}, [bad], jc.statistics.magnitudes())
    with pytest.raises(ValueError, match="'w' in calibration are not finite"):
        wrapped(w, static, stats=stats)
    with pytest.raises(TypeError, match=r"'w' maps to 0\.5"):
        wrapped(w, 0.5)
    with pytest.raises(TypeError, match="'w' are pruned already"):
        wrapped(wrapped(w, Sparse(0.5))["w"], Sparse(0.5))
    with pytest.raises(TypeError, match="'w' is no array of two axes"):
        wrapped(jnp.ones(3), Sparse(0.5))
    with pytest.raises(ValueError, match=r"at least 0 and below 1; got 1\.0"):
        Sparse(1.0)
    with pytest.raises(ValueError, match="no whole number of 4"):
        Sparse(0.4, group_size=4)
    with pytest.raises(ValueError, match="knows no groups"):
        Sparse(0.5, group_size=4, static=True)
    with pytest.raises(ValueError, match="n=3, m=2"):
        jc.prune.nm_activations(w, 3, 2)


@pytest.mark.parametrize("spec", [Sparse(0.75), Sparse(0.5, static=True)])
def test_matrices_that_are_looked_up_prune_their_activations(spec):
    params, which = {"w": random(3, 16, 4)}, jnp.array([0, 2, 1, 2])
    lookup = lambda p, x: jnp.einsum("bk,bkn->bn", x, p["w"][which])
    x = random(4, 16, seed=1) * jnp.arange(1.0, 5.0)[:, None]
    stats = jc.calibrate(lookup, params, [x], jc.statistics.magnitudes())
    sparse = jc.prune.prune_activations(params, {"w": spec}, stats=stats)
    if spec.static:
        threshold = np.asarray(sparse["w"].threshold).reshape(3, 1)[np.asarray(which)]
        kept = np.where(np.abs(x) > threshold, x, 0)
    else:
        kept = largest(np.asarray(x), spec.sparsity)
    dense = np.asarray(params["w"], np.float64)[np.asarray(which)]
    want = np.einsum("bk,bkn->bn", kept, dense)
    np.testing.assert_allclose(jc.accelerate(lookup)(sparse, x), want, rtol=1e-5, atol=1e-5)


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no axis 2"):
        jc.prune.top_k_activations(jnp.ones((2, 3)), 0.5, axis=2)
