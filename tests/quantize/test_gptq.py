"""GPTQ against the textbook: a column at a time, the inverse made anew each time, float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import random
from jaxcompress import _compensate
from jaxcompress.quantize import _gptq

model = lambda p, x: x @ p["w"]


def correlated(m, k, seed=0):
    """Activations of different sizes that depend on each other."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, k)) @ (np.eye(k) + 0.5 * rng.normal(size=(k, k)) / np.sqrt(k))
    return (x * np.exp(rng.normal(size=k) / 2)).astype(np.float32)


def assert_textbook(q, w, x, damping, order):
    """Each code is the nearest one, given what the codes before it left to make up for.

    The optimal brain surgeon in float64: after column `j` is fixed, the remaining ones move
    by `-(error_j / [H^-1]_jj) [H^-1]_j`, with `H` of the remaining columns only, inverted
    from scratch. The oracle follows the codes under test, because behind a tie that float32
    decided the other way everything would differ; so each one can be checked.
    """
    codes, scale = oracles.codes_of(q), oracles.spread(q.scale, q.shape, q.axis, q.group_size)
    zero = np.zeros(q.shape)
    if q.zero_point is not None:
        zero = oracles.spread(q.zero_point, q.shape, q.axis, q.group_size).astype(np.float64)
    h = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    mean = h.diagonal()[h.diagonal() > 0].mean()
    columns = np.argsort(-h.diagonal(), kind="stable") if order else np.arange(len(w))
    h += np.diag(damping * mean + np.where(h.diagonal() > 0, 0, mean))
    w, low, high = np.array(w, np.float64), q.qtype.low, q.qtype.high
    for i, j in enumerate(columns):
        inside = np.clip(w[j] / scale[j] + zero[j], low, high)
        # Half a code for rounding; float32 sums of this size are right to 1e-4 of a code.
        assert np.abs(inside - codes[j]).max() < 0.5 + 1e-3
        rest = columns[i:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        error = w[j] - (codes[j] - zero[j]) * scale[j]
        w[rest] -= np.outer(inverse[0] / inverse[0, 0], error)


@pytest.mark.parametrize(
    "spec",
    [
        jc.quantize.int8(),
        jc.quantize.int2(),
        jc.quantize.int4(group_size=13),  # does not divide 40
        jc.quantize.int3(symmetric=False, group_size=16),
        jc.quantize.Spec(qtype=jc.arrays.IntType(5), axis=(-2, -1)),
    ],
    ids=lambda s: f"{s.qtype.name}-{s.group_size}",
)
def test_is_the_textbook_column_loop(spec):
    x, w = correlated(100, 40), random(40, 6)
    x[:, 3] = 0  # a feature that is never active
    q = jc.quantize.gptq(
        model, {"w": jnp.asarray(w)}, [x[:50], x[50:]], {"w": spec}, block_size=16, search=False
    )["w"]
    assert_textbook(q, w, x, 0.01, order=True)


def test_outputs_are_solved_some_after_the_others(monkeypatch):
    """Eleven outputs, four at a time: the last four begin within those before them."""
    monkeypatch.setattr(_gptq, "_OUTPUTS", 4)
    x, w = correlated(100, 26), random(26, 11)  # a shape that nothing else has compiled
    spec = jc.quantize.int3(symmetric=False, group_size=16)
    run = lambda **more: jc.quantize.gptq(
        model, {"w": jnp.asarray(w)}, [x], {"w": spec}, block_size=8, **more
    )["w"]
    assert_textbook(run(search=False), w, x, 0.01, order=True)
    q, reports = run(), []
    # And the host hears of it in between: three pieces in each of seven rounds.
    monkeypatch.setattr(_compensate, "_STEP", 1)
    again = run(progress=reports.append)
    jax.tree.map(np.testing.assert_array_equal, again, q)
    np.testing.assert_allclose([r.fraction for r in reports], np.arange(1, 22) / 21, atol=1e-6)
    assert [type(r).__name__ for r in reports] == ["Working"] * 20 + ["Finished"]
    assert {r.number for r in reports[:-1]} == {0}


def test_in_the_order_of_the_weights():
    x, w = correlated(100, 24), random(24, 6)
    q = jc.quantize.gptq(
        model,
        {"w": jnp.asarray(w)},
        [x],
        {"w": jc.quantize.int4()},
        activation_order=False,
        search=False,
        damping=0.1,
        block_size=7,
    )["w"]
    assert_textbook(q, w, x, 0.1, order=False)
    # Without the search the scales are those of rounding to nearest.
    assert np.array_equal(
        q.scale, jc.quantize.quantize({"w": jnp.asarray(w)}, {"w": jc.quantize.int4()})["w"].scale
    )


def textbook(w, h, scale, damping, high):
    """The column loop in float64, features of the largest activations first."""
    h, w = h + damping * h.diagonal().mean() * np.eye(len(h)), np.array(w, np.float64)
    columns, codes = np.argsort(-h.diagonal(), kind="stable"), np.zeros(w.shape)
    for i, j in enumerate(columns):
        codes[j] = np.clip(np.rint(w[j] / scale), -high, high)
        rest = columns[i:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        w[rest] -= np.outer(inverse[0] / inverse[0, 0], w[j] - codes[j] * scale)
    return codes


@pytest.mark.parametrize("axis", [-2, (-2, -1)], ids=["output", "tensor"])
def test_the_search_takes_the_best_of_seven_and_fits_the_scales_to_its_codes(axis):
    x, w = correlated(200, 16), random(16, 4)
    h = x.astype(np.float64).T @ x
    rules = {"w": jc.quantize.int2(axis=axis)}
    found = jc.quantize.gptq(model, {"w": jnp.asarray(w)}, [x], rules, damping=1e-3)["w"]
    shared = (lambda a: a.sum(0)) if axis == -2 else (lambda a: np.full(4, a.sum()))
    best = np.full(4, np.inf)
    codes, start = np.zeros((16, 4)), np.zeros(4)
    full = np.full(4, np.abs(w).max()) if axis != -2 else np.abs(w).max(0)
    for part in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        tried = textbook(w, h, part * full, 1e-3, high=1)
        error = tried * part * full - w
        lost = shared(error * (h @ error))
        better = lost < best
        best, start = np.where(better, lost, best), np.where(better, part * full, start)
        codes = np.where(better, tried, codes)
    assert (start < full).any()
    np.testing.assert_array_equal(oracles.codes_of(found), codes)
    want = shared(codes * (h @ w)) / shared(codes * (h @ codes))
    np.testing.assert_allclose(np.broadcast_to(found.scale, (1, 4))[0], want, rtol=1e-5)
    assert not np.allclose(want, start, rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 3])
def test_scales_are_fitted_beside_zero_points(bits):
    """Weights far from zero, so that zero points are at the end of what eight bits hold."""
    x, w = correlated(200, 16), np.abs(random(16, 4)) + 1
    rules = {"w": jc.quantize.Spec(qtype=jc.arrays.IntType(bits, symmetric=False))}
    solve = lambda search: jc.quantize.gptq(
        model, {"w": jnp.asarray(w)}, [x], rules, search=search
    )["w"]
    lost = lambda q: np.linalg.norm(x @ (oracles.dense(q) - w).astype(np.float64), axis=0)
    assert np.all(lost(solve(True)) <= lost(solve(False)) * (1 + 1e-3))


def test_experts_are_solved_each_with_its_own_activations():
    x, w = random(3, 60, 16), random(3, 16, 5, seed=1)
    x *= np.exp(random(3, 1, 16, seed=2))
    q = jc.quantize.gptq(
        lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"]),
        {"w": jnp.asarray(w)},
        [x],
        {"w": jc.quantize.int3()},
        search=False,
    )["w"]
    assert q.scale.shape == (3, 1, 5)
    for e in range(3):
        one = jax.tree.map(lambda leaf, e=e: leaf[e], q)
        assert_textbook(one, w[e], x[e], 0.01, order=True)


def test_attention_and_transposed_weights():
    """Contracted axes are found, wherever they are: -3, (-3, -2), -1."""
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    x = jnp.asarray(random(4, 12, 8))
    fn = lambda p, x: attention.apply(p["a"], x, x) @ p["w"].T
    params = {"a": attention.init(jax.random.key(0), x, x), "w": jnp.asarray(random(5, 8))}
    rules = {r".*kernel|w": jc.quantize.int4()}
    q = jc.quantize.gptq(fn, params, [x], rules, search=False)
    layers = q["a"]["params"]
    assert layers["query"]["kernel"].axis == (-3,)
    assert layers["out"]["kernel"].axis == (-3, -2)
    assert q["w"].axis == (-1,)
    flat = np.asarray(x).reshape(-1, 8)
    query = layers["query"]["kernel"]
    turned = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], 8), query)
    turned = jc.arrays.QuantizedArray(
        turned.values, turned.scale, qtype=query.qtype, axis=(-2,), packed=8
    )
    dense = params["a"]["params"]["query"]["kernel"].reshape(8, 8)
    assert_textbook(turned, dense, flat, 0.01, order=True)
    out = jc.accelerate(attention.apply)(q["a"], x, x)
    q_w = jax.tree.map(jnp.transpose, q["w"])
    q_w = jc.arrays.QuantizedArray(q_w.values, q_w.scale, qtype=q["w"].qtype, axis=(-2,), packed=8)
    assert_textbook(q_w, params["w"].T, np.asarray(out).reshape(-1, 8), 0.01, order=True)


def test_damping_adapts_where_a_factorization_fails():
    """Two features that are the same, and a damping too small for float32 to notice."""
    x, w = correlated(60, 12), random(12, 4)
    x[:, 1:] = x[:, :1]
    solve = lambda damping: jc.quantize.gptq(
        model, {"w": jnp.asarray(w)}, [x], {"w": jc.quantize.int4()}, damping=damping
    )["w"]
    codes = oracles.codes_of(solve(1e-8))
    assert any(np.array_equal(codes, oracles.codes_of(solve(1e-8 * 10**i))) for i in range(1, 5))
    with pytest.raises(
        ValueError, match=r"'w' have no Cholesky factor, with 1e-14, 1e-13.*damping"
    ):
        solve(1e-14)


def test_activations_that_are_not_finite_raise():
    x = correlated(10, 8)
    x[0, 0] = np.inf
    params, rules = {"w": jnp.asarray(random(8, 4))}, {"w": jc.quantize.int4()}
    with pytest.raises(ValueError, match="'w' are not finite"):
        jc.quantize.gptq(model, params, [x], rules)
    with pytest.raises(ValueError, match="no batches"):
        jc.quantize.gptq(model, params, [], rules)
    with pytest.raises(ValueError, match="damping is positive"):
        jc.quantize.gptq(model, params, [x], rules, damping=0.0)
    with pytest.raises(ValueError, match="block_size is 1 or more"):
        jc.quantize.gptq(model, params, [x], rules, block_size=0)


def test_program_does_not_grow_with_the_columns():
    from jaxcompress._matrices import Matrices
    from jaxcompress.quantize._gptq import _columns

    def size(k):
        w, h, order = jnp.zeros((1, k, 4)), jnp.zeros((1, k, k)), jnp.zeros((1, k), int)
        static = dict(matrices=Matrices((k, 4), (-2,), ()), axis=(-2,), group_size=None)
        static |= dict(qtype=jc.arrays.IntType(4), block_size=16)
        done = jnp.zeros(w.shape, jnp.int8), jnp.zeros((1, 4))
        traced = _columns.trace(done, 0, 1, w, jnp.ones((1, 4)), None, h, order, h, **static)
        return str(traced.jaxpr).count(" = ")

    assert size(64) == size(1024)
