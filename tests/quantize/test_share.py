"""`share`: the centroids of textbook k-means, exact zeros, and training them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

import jaxcompress as jc
import oracles
from checks import random


def lloyd(values, count):
    """Textbook: every weight asks every centroid, every centroid averages its weights."""
    values = np.asarray(values, np.float64).ravel()
    low, high = values.min(), values.max()
    centroids = [low + (high - low) * i / max(count - 1, 1) for i in range(count)]
    nearest = None
    while True:
        # The last of equally near centroids.
        new = [max(range(count), key=lambda k: (-abs(v - centroids[k]), k)) for v in values]
        if new == nearest:
            return np.array(centroids), np.array(nearest)
        nearest = new
        for k in range(count):
            mine = [v for v, i in zip(values, nearest) if i == k]
            centroids[k] = sum(mine) / len(mine) if mine else centroids[k]


def one(w, bits, mask=None, **kwargs):
    masks = None if mask is None else {"w": jnp.asarray(mask)}
    rules = {"w": jc.quantize.codebook(bits=bits, **kwargs)}
    return jc.quantize.share({"w": jnp.asarray(w)}, rules, masks=masks)["w"]


@given(
    st.sampled_from([1, 2, 17, 60]), st.sampled_from([1, 2, 3]), st.booleans(), st.integers(0, 9)
)
def test_centroids_are_those_of_the_textbook(size, bits, masked, seed):
    w = random(size, seed=seed)
    mask = (np.random.default_rng(seed).random(size) < 0.7) if masked else np.ones(size, bool)
    mask[0] = True
    shared = one(w, bits, mask if masked else None)
    table, nearest = lloyd(w[mask], 2**bits - masked)
    # Sums in another order, in float64; the codebook is rounded to float32.
    np.testing.assert_allclose(shared.codebook, table, rtol=2**-23, atol=1e-12)
    want = np.zeros(size, np.float32)
    want[mask] = np.asarray(shared.codebook)[nearest]
    np.testing.assert_array_equal(shared.materialise(), want)
    assert shared.zero == masked


def test_they_are_those_of_scikit_learn():
    w = random(400)
    start = np.linspace(w.min(), w.max(), 16).reshape(-1, 1)
    peer = KMeans(16, init=start, n_init=1, max_iter=1000, tol=0, algorithm="lloyd")
    peer.fit(w.reshape(-1, 1).astype(np.float64))
    # Its sums are taken after the mean is subtracted.
    np.testing.assert_allclose(one(w, 4).codebook, peer.cluster_centers_[:, 0], rtol=1e-6)


def test_dropped_weights_are_zero_and_pack_keeps_the_rest():
    w, mask = random(20, 30), np.random.default_rng(1).random((20, 30)) < 0.2
    shared = one(w, 3, mask)
    dense = np.asarray(shared.materialise())
    np.testing.assert_array_equal(dense != 0, mask)
    assert len(np.unique(dense[mask])) == 7
    packed = jc.prune.pack({"w": shared}, {"w": jnp.asarray(mask)})["w"]
    np.testing.assert_array_equal(packed.materialise(), dense)
    kept = int(mask.sum())
    assert packed.nbytes == 600 // 8 + -(-kept // 64) * 24 + 7 * 4
    # Codes are those of the kept ones, in row-major order, without that of zero.
    codes = oracles.unpack(packed.values.indices, 3, kept, -1) % 8
    np.testing.assert_array_equal(np.asarray(shared.codebook)[codes], dense[mask])
    fewer = mask & (np.random.default_rng(2).random((20, 30)) < 0.5)
    packed = jc.prune.pack({"w": shared}, {"w": jnp.asarray(fewer)})["w"]
    np.testing.assert_array_equal(packed.materialise(), np.where(fewer, dense, 0))


@pytest.mark.parametrize("how", ["layout", "spec"])
def test_stacked_layers_keep_their_own_values(how):
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    params, x = {"w": jnp.asarray(random(3, 6, 6))}, random(2, 6)
    found = jc.layout(fn, params, x) if how == "layout" else None
    spec = jc.quantize.codebook(bits=2, leading=None if found else 1)
    masks = jc.prune.mask(params, jc.prune.unstructured(), 0.5)
    shared = jc.quantize.share(params, {"w": spec}, masks=masks, layout=found)
    assert shared["w"].codebook.shape == (3, 3)
    packed = jc.prune.pack(shared, masks)
    assert packed["w"].bitmap.shape == (3, 5)
    for i in range(3):
        alone = one(params["w"][i], 2, masks["w"][i])
        np.testing.assert_array_equal(shared["w"].materialise()[i], alone.materialise())
    np.testing.assert_array_equal(packed["w"].materialise(), shared["w"].materialise())
    got, want = (jax.jit(jc.accelerate(fn))(p, x) for p in (packed, shared))
    np.testing.assert_allclose(got, want, rtol=1e-6)  # the same floats, in another program


@pytest.mark.parametrize("inner", [optax.sgd(0.1, momentum=0.9), optax.adamw(1e-2)])
def test_any_optimizer_trains_the_values_and_nothing_else(inner):
    params = {"w": jnp.asarray(random(12, 6)), "b": jnp.zeros(6)}
    masks = jc.prune.mask(params, jc.prune.unstructured(), 0.5)
    params = jc.quantize.share(params, {"w": jc.quantize.codebook(bits=2)}, masks=masks)
    x, y = random(32, 12, seed=1), random(32, 6, seed=2)
    loss = lambda p: jnp.mean((jc.accelerate(lambda p, x: x @ p["w"] + p["b"])(p, x) - y) ** 2)
    tx = optax.multi_transform(
        {"weight": inner, "frozen": jc.quantize.freeze()}, jc.quantize.trainable(params)
    )

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss, allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    trained, state = params, tx.init(params)
    for _ in range(5):
        trained, state = step(trained, state)
    assert loss(trained) < loss(params)
    np.testing.assert_array_equal(trained["w"].indices, params["w"].indices)
    assert trained["w"].indices.dtype == jnp.uint8
    dense = np.asarray(trained["w"].materialise())
    np.testing.assert_array_equal(dense != 0, masks["w"])
    assert len(np.unique(dense)) == 4
    assert jax.tree.structure(trained) == jax.tree.structure(params)


def test_degenerate_weights():
    for w in (np.zeros((4, 3), np.float32), np.full((2, 2), 3.5, np.float32)):
        np.testing.assert_array_equal(one(w, 4).materialise(), w)
    assert one(np.zeros((0, 3), np.float32), 2).materialise().shape == (0, 3)
    nothing = one(random(4, 3), 2, np.zeros((4, 3), bool))
    assert not nothing.materialise().any()
    packed = jc.prune.pack({"w": nothing}, {"w": jnp.zeros((4, 3), bool)})["w"]
    assert not packed.materialise().any()
    half = one(random(8, 8).astype(jnp.bfloat16), 3)
    assert half.materialise().dtype == half.codebook.dtype == jnp.bfloat16


PARAMS = {"w": jnp.ones((4, 2)), "i": jnp.arange(3)}
SPEC = jc.quantize.codebook(bits=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jc.quantize.share(PARAMS, {"v": SPEC}), ValueError, "'v' matches none"),
        (lambda: jc.quantize.share(PARAMS, {"i": SPEC}), TypeError, "'i' is no floating array"),
        (lambda: jc.quantize.share(PARAMS, {"w": 4}), TypeError, r"'w' maps to 4; expected jc"),
        (lambda: one(jnp.full((2, 2), jnp.nan), 2), ValueError, "'w' holds NaN"),
        (lambda: jax.jit(lambda w: one(w, 2))(jnp.ones(3)), ValueError, "'w' outside jit"),
        (lambda: one(np.ones((2, 2)), 2, np.ones(2, bool)), ValueError, r"shape \(2, 2\)"),
        (lambda: one(np.ones((2, 2)), 2, leading=3), ValueError, "'w' has 2 axes, and 3"),
        (lambda: jc.quantize.codebook(bits=9), ValueError, "1 to 8 bits; got 9"),
        (lambda: jc.quantize.codebook(bits=2, leading=-1), ValueError, "got -1"),
        (
            lambda: jc.quantize.share(jc.quantize.share(PARAMS, {"w": SPEC}), {"w": SPEC}),
            TypeError,
            "'w' is a CodebookArray already",
        ),
        (
            lambda: jc.prune.pack(
                {"w": one(np.ones((4, 4)), 2)},
                {"w": jnp.ones((4, 4), bool)},
                pattern=jc.prune.nm(2, 4, axis=-2),
            ),
            TypeError,
            "'w' has shared values, which only a bitmap",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
