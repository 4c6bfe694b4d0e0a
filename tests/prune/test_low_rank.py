"""`low_rank` against the best that there is, in float64, and `LowRankArray` in products."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from checks import random
from jaxcompress.arrays import LowRankArray

dense = lambda p, x: x @ p["w"]


def least(w, r, x=None):
    """The least `||x (w - u v)||_F` of any rank-`r` product, `||w - u v||_F` without `x`.

    Eckart and Young: what is behind the `r` largest singular values of `x w`. Whatever `x w`
    is cut to, is `x` times something, because the columns of the cut are within those of `x`.
    """
    w = np.asarray(w, np.float64)
    product = w if x is None else np.asarray(x, np.float64) @ w
    return np.sqrt((np.linalg.svd(product, compute_uv=False)[r:] ** 2).sum())


def lost(w, array, x=None):
    difference = np.asarray(array.materialise(), np.float64) - w
    return np.linalg.norm(difference if x is None else np.asarray(x, np.float64) @ difference)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
@pytest.mark.parametrize("rank", [1, 4])
def test_is_the_best_of_its_rank(shape, rank):
    w = random(*shape)
    x = random(50, shape[0], seed=1) @ random(shape[0], shape[0], seed=2)
    stats = jc.calibrate(dense, {"w": w}, [x[:25], x[25:]], jc.statistics.second_moment())
    plain = jc.prune.low_rank({"w": w}, ["w"], rank=rank)["w"]
    found = jc.layout(dense, {"w": w}, x)
    seen = jc.prune.low_rank({"w": w}, ["w"], rank=rank, stats=stats, layout=found)["w"]
    assert (seen.u.shape, seen.v.shape) == ((shape[0], rank), (rank, shape[1]))
    assert seen.nbytes == 4 * rank * sum(shape)
    # float32 factors, float32 moments and a damping of 1e-6 together.
    np.testing.assert_allclose(lost(w, plain), least(w, rank), rtol=1e-4)
    np.testing.assert_allclose(lost(w, seen, x), least(w, rank, x), rtol=1e-3)
    assert lost(w, seen, x) < lost(w, plain, x)


def test_what_no_activation_shows_is_kept_as_the_rest_allows():
    """Two rows for eight inputs: the moments are singular, and all of them have a factor."""
    w, x = random(8, 20), random(2, 8, seed=1)
    stats = jc.calibrate(dense, {"w": w}, [x], jc.statistics.second_moment())
    small = jc.prune.low_rank({"w": w}, ["w"], rank=4, stats=stats)["w"]
    assert np.isfinite(small.materialise()).all()
    # Both seen directions whole (up to damping and float32), and two of the six others.
    assert lost(w, small, x) < 1e-3 * np.linalg.norm(x @ w)
    assert lost(w, small) < 0.95 * np.linalg.norm(w)
    zero = jc.calibrate(dense, {"w": w}, [0 * x], jc.statistics.second_moment())
    zero = jc.prune.low_rank({"w": w}, ["w"], rank=4, stats=zero)["w"]
    np.testing.assert_allclose(lost(w, zero), least(w, 4), rtol=1e-4)


def test_energy_is_the_least_rank_that_keeps_it():
    values = np.array([4.0, 3.0, 2.0, 1.0] + [0.0] * 6)  # squares 16, 9, 4, 1 of 30
    q = np.linalg.qr(random(10, 10).astype(np.float64))[0]
    w = jnp.float32(q * values @ q)
    rank = lambda energy: jc.prune.low_rank({"w": w}, ["w"], energy=energy)["w"].rank
    assert [rank(e) for e in (0.5, 25 / 30 - 1e-3, 25 / 30 + 1e-3, 29 / 30 + 1e-3)] == [1, 2, 3, 4]
    whole = {"w": jnp.asarray(random(10, 10))}
    assert jc.prune.low_rank(whole, ["w"], energy=1.0)["w"] is whole["w"]  # saves nothing


def model(params, x):
    heads = jnp.einsum("td,dhs->ths", x, params["query"])
    x = jnp.tanh(jnp.einsum("ths,hsd->td", heads, params["out"]))
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    x = jnp.einsum("etd,edf->tf", jnp.stack([x, -x, 2 * x]), params["experts"])
    return jnp.sin(x @ params["linear"].T)


def test_every_form_of_weight_goes_through_its_rank():
    shapes = {"query": (8, 2, 4), "out": (2, 4, 8), "stack": (3, 8, 8), "linear": (5, 8)}
    shapes |= {"experts": (3, 8, 8)}
    params = {k: jnp.asarray(random(*s, seed=i)) for i, (k, s) in enumerate(shapes.items())}
    x = jnp.asarray(random(20, 8, seed=9))
    found = jc.layout(model, params, x)
    stats = jc.calibrate(model, params, [x], jc.statistics.second_moment())
    # Axes of experts are contracted in this einsum, together with what each of them contracts.
    rules = ["query", "out", "stack", "linear"]
    small = jc.prune.low_rank(params, rules, rank=3, layout=found, stats=stats)
    shapes = {k: (small[k].u.shape, small[k].v.shape) for k in rules}
    assert shapes == {
        "query": ((8, 3), (3, 2, 4)),
        "out": ((2, 4, 3), (3, 8)),
        "stack": ((3, 8, 3), (3, 3, 8)),
        "linear": ((5, 3), (3, 8)),
    }
    rows = jc.explain(model, small, x)
    assert {(row.path, row.op) for row in rows} == {(path, "low_rank") for path in rules}
    whole = {k: p.materialise() if k in rules else p for k, p in small.items()}
    got = jax.jit(jc.accelerate(model))(small, x)
    # Sums of eight in another order, through five layers of numbers near one.
    np.testing.assert_allclose(got, model(whole, x), rtol=1e-4, atol=1e-5)
    # Outputs of the first layer: the best that its rank allows.
    flat = np.asarray(params["query"]).reshape(8, 8)
    off = np.asarray(small["query"].materialise()).reshape(8, 8) - flat
    np.testing.assert_allclose(np.linalg.norm(x @ off), least(flat, 3, x), rtol=1e-3)


def test_a_batch_of_experts_and_vmap():
    x, w = jnp.asarray(random(3, 6, 8)), jnp.asarray(random(3, 8, 10, seed=1))
    fn = lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"])
    found = jc.layout(fn, {"w": w}, x)
    small = jc.prune.low_rank({"w": w}, ["w"], rank=2, layout=found)
    for e in range(3):
        one = jax.tree.map(lambda leaf, e=e: leaf[e], small["w"])
        np.testing.assert_allclose(lost(w[e], one), least(w[e], 2), rtol=1e-4)
    want = fn({"w": small["w"].materialise()}, x)
    for run in (jc.accelerate(fn), jax.vmap(jc.accelerate(dense))):
        np.testing.assert_allclose(run(small, x), want, rtol=1e-4, atol=1e-5)  # as above
    assert not jc.explain(fn, small, x).materialised


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_views(order):
    w = LowRankArray(random(6, 2), random(2, 9, seed=1))
    fn = lambda p, x: jnp.dot(x, jnp.transpose(p["w"].astype(jnp.bfloat16), order))
    x = jnp.asarray(random(4, w.shape[order[0]], seed=2), jnp.bfloat16)
    got = jc.accelerate(fn)({"w": w}, x)
    assert got.dtype == jnp.bfloat16
    assert not jc.explain(fn, {"w": w}, x).materialised
    want = np.asarray(x, np.float64) @ np.asarray(w.materialise(), np.float64).transpose(order)
    # Three roundings to 8 bits, of factors and of what is between them.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.02 * np.abs(want).max())
    other = lambda p, x: x @ p["w"].reshape(3, 18)
    [row] = jc.explain(other, {"w": w}, jnp.ones((4, 3))).materialised
    assert row.why == "no rule for two factors"
    whole, x = other({"w": w.materialise()}, jnp.ones((4, 3))), jnp.ones((4, 3))
    # The same sums of three, compiled in another way.
    np.testing.assert_allclose(jc.accelerate(other)({"w": w}, x), whole, rtol=1e-5, atol=1e-5)


def test_the_weight_may_come_first():
    w = jnp.asarray(random(3, 6, 2)), jnp.asarray(random(3, 2, 5, seed=1))
    w = LowRankArray(*w)
    fn = lambda p, x: jax.lax.dot_general(p["w"], x, (((1,), (2,)), ((0,), (0,))))
    x = jnp.asarray(random(3, 4, 6, seed=2))
    got = jc.accelerate(fn)({"w": w}, x)
    # Float32 sums of six.
    np.testing.assert_allclose(got, fn({"w": w.materialise()}, x), rtol=1e-4, atol=1e-5)
    assert not jc.explain(fn, {"w": w}, x).materialised


def test_factors_train():
    net, x = nn.Dense(6), jnp.asarray(random(40, 8))
    params = net.init(jax.random.key(0), x)
    target = net.apply(params, x)
    small = jc.prune.low_rank(params, [".*kernel"], rank=2)
    labels = jc.quantize.trainable(small)["params"]["kernel"]
    assert (labels.u, labels.v) == ("weight", "weight")
    loss = lambda p: jnp.mean((jc.accelerate(net.apply)(p, x) - target) ** 2)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(p, state):
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    trained, state = small, tx.init(small)
    for _ in range(60):
        trained, state = step(trained, state)
    assert loss(trained) < 0.98 * loss(small)


W = {"w": random(8, 8), "b": random(8)}


@pytest.mark.parametrize(
    ("rules", "options", "error", "message"),
    [
        (["w"], {}, ValueError, "rank= or energy="),
        (["w"], {"rank": 2, "energy": 0.9}, ValueError, "rank= or energy="),
        (["w"], {"rank": 0}, ValueError, "rank is 1 or more"),
        (["w"], {"energy": 1.5}, ValueError, "energy is above 0"),
        (["w"], {"rank": 2, "damping": 0.0}, ValueError, "damping is positive"),
        (["w"], {"rank": 4}, ValueError, "a rank of 4 saves nothing of 'w', 8 inputs and 8 out"),
        (["b"], {"rank": 1}, ValueError, "'b' has the shape"),
        (["v"], {"rank": 1}, ValueError, "'v' matches none"),
    ],
)
def test_what_cannot_be_done_is_said(rules, options, error, message):
    with pytest.raises(error, match=message):
        jc.prune.low_rank(W, rules, **options)


def test_other_leaves_and_statistics_are_refused():
    once = jc.prune.low_rank(W, ["w"], rank=1)
    with pytest.raises(TypeError, match="'w' is a LowRankArray already"):
        jc.prune.low_rank(once, ["w"], rank=1)
    with pytest.raises(TypeError, match="'n' is no floating array"):
        jc.prune.low_rank({"n": jnp.ones((4, 4), int)}, ["n"], rank=1)
    with pytest.raises(ValueError, match="'w' holds NaN"):
        jc.prune.low_rank({"w": W["w"] * np.nan}, ["w"], rank=1)
    turned = lambda p, x: x @ p["w"].T
    params, x = {"w": random(5, 8)}, random(9, 8)
    stats = jc.calibrate(turned, params, [x], jc.statistics.second_moment())
    with pytest.raises(ValueError, match=r"of 8 inputs, and it contracts 5; give layout="):
        jc.prune.low_rank(params, ["w"], rank=1, stats=stats)
    square = {"w": random(8, 8)}
    stats = jc.calibrate(turned, square, [x], jc.statistics.second_moment())
    with pytest.raises(ValueError, match=r"'w' is square.*give layout="):
        jc.prune.low_rank(square, ["w"], rank=1, stats=stats)
    other, both = lambda p, x: x @ p["v"], {"w": W["w"], "v": W["w"]}
    unmet = jc.calibrate(other, both, [x], jc.statistics.second_moment())
    with pytest.raises(ValueError, match="comes from no activations"):
        jc.prune.low_rank(both, ["w"], rank=1, stats=unmet)
    middle = lambda p, x: jnp.einsum("td,hds->ths", x, p["w"])
    params, x = {"w": random(2, 8, 4)}, random(9, 8)
    with pytest.raises(ValueError, match="each of the others together"):
        jc.prune.low_rank(params, ["w"], rank=1, layout=jc.layout(middle, params, x))
