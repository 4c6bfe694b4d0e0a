"""SNIP, GraSP, SynFlow, Wanda: the papers' formulas in float64 numpy, and collapse of layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
import oracles_pruning as oracles

SHAPES = {"a": (5, 4), "b": (4, 3)}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def batches(n=3, rows=6):
    rng = np.random.default_rng(9)
    draw = lambda columns: rng.normal(size=(rows, columns)).astype(np.float32)
    return [(draw(5), draw(3)) for _ in range(n)]


def loss(params, batch):
    x, y = batch
    out = jnp.tanh(x @ params["a"]) @ params["b"] + params.get("bias", 0.0)
    return jnp.mean((out - y) ** 2)


def gradient(w, data):
    """The mean over batches of the gradient of `loss`, by hand, in float64."""
    total = {k: np.zeros(s) for k, s in SHAPES.items()}
    for x, y in data:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        hidden = np.tanh(x @ w["a"])
        out = 2 * (hidden @ w["b"] - y) / y.size
        total["b"] += hidden.T @ out
        total["a"] += x.T @ ((out @ w["b"].T) * (1 - hidden**2))
    return {k: v / len(data) for k, v in total.items()}


def float64(w):
    return {k: np.asarray(v, np.float64) for k, v in w.items()}


def test_snip_is_the_gradient_times_the_weight():
    w, data = weights(), batches()
    found = jc.prune.snip(loss, w, iter(data))
    exact = gradient(float64(w), data)
    for k in SHAPES:
        assert found[k].dtype == jnp.float32
        # A few dozen float32 roundings of sums of a few ones.
        np.testing.assert_allclose(found[k], abs(exact[k] * w[k]), rtol=1e-4, atol=2e-6)


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient():
    w, data = weights(), batches()
    found = jc.prune.grasp(loss, w, iter(data))
    exact, step = float64(w), 1e-5
    g = gradient(exact, data)
    moved = [gradient({k: exact[k] + sign * step * g[k] for k in SHAPES}, data) for sign in (1, -1)]
    for k in SHAPES:
        want = exact[k] * (moved[0][k] - moved[1][k]) / (2 * step)
        # The difference quotient is good to step^2; the rest is float32.
        np.testing.assert_allclose(found[k], want, rtol=2e-4, atol=5e-6)


def test_scores_are_given_where_they_are_asked_for_and_masks_follow():
    params = weights() | {"bias": np.zeros(3, np.float32)}
    scores = jc.prune.snip(loss, params, batches(), rules=["b"])
    assert isinstance(scores["a"], optax.MaskedNode)
    assert isinstance(scores["bias"], optax.MaskedNode)
    masks = jc.prune.mask(scores, jc.prune.unstructured(), 0.5)
    assert np.count_nonzero(masks["b"]) == 6
    pruned = jc.prune.apply(params, masks)
    np.testing.assert_array_equal(pruned["a"], params["a"])
    np.testing.assert_array_equal(np.asarray(pruned["b"]) != 0, masks["b"])


def test_the_weight_of_a_fake_quant_array_is_scored():
    params = jc.quantize.prepare_qat(weights(), {"b": jc.quantize.int8()})
    run = jc.accelerate(lambda p, batch: loss(p, batch))
    scores = jc.prune.snip(run, params, batches(), rules=["b"])
    assert scores["b"].shape == (4, 3)
    assert np.count_nonzero(scores["b"]) == 12


def synflow_by_hand(mats):
    """`R = 1' |W1| |W2| ... 1`, and each weight's share of it."""
    mats = [abs(np.asarray(m, np.float64)) for m in mats]
    scores = []
    for i, m in enumerate(mats):
        before, after = np.ones(mats[0].shape[0]), np.ones(mats[-1].shape[1])
        for other in mats[:i]:
            before = before @ other
        for other in reversed(mats[i + 1 :]):
            after = other @ after
        scores.append(np.outer(before, after) * m)
    return scores


def deep(params, x):
    for k in sorted(params):
        x = jax.nn.relu(x @ params[k])
    return x


def deep_params():
    rng = np.random.default_rng(3)
    sizes = [12, 40, 40, 6, 2]
    # The second layer's weights are small: by magnitude it would go first.
    scales = [1.0, 1e-3, 1.0, 1.0]
    return {
        str(i): (scales[i] * rng.normal(size=sizes[i : i + 2])).astype(np.float32) for i in range(4)
    }


def test_synflow_is_the_flow_through_each_weight():
    params = deep_params()
    found = jc.prune.synflow(deep, params, [np.zeros((1, 12), np.float32)])
    want = synflow_by_hand([params[k] for k in sorted(params)])
    for k, exact in zip(sorted(params), want):
        np.testing.assert_allclose(found[k], exact, rtol=1e-5)  # sums of 40 positive terms
    # What flows through one layer flows through every other.
    flows = [float(np.sum(found[k])) for k in sorted(params)]
    np.testing.assert_allclose(flows, flows[0], rtol=1e-5)


def test_synflow_in_rounds_empties_no_layer():
    """Its axiom: no layer is emptied while another has more than it needs."""
    params = deep_params()
    total = sum(p.size for p in params.values())
    keep = 8  # two weights a layer, of 2,332
    x = np.zeros((1, 12), np.float32)
    masks = jc.prune.iterative(
        lambda p, m: jc.prune.synflow(deep, p, [x]),
        params,
        jc.prune.unstructured(),
        1 - keep / total,
        rounds=30,
        distribution=jc.prune.global_(),
    )
    counts = [np.count_nonzero(m) for m in masks.values()]
    assert sum(counts) == keep
    assert min(counts) >= 1
    scores = synflow_by_hand([np.where(masks[k], params[k], 0) for k in sorted(params)])
    assert all(s.sum() > 0 for s in scores)  # a path from an input to an output is left
    by_size = jc.prune.mask(
        jax.tree.map(abs, params),
        jc.prune.unstructured(),
        0.9,
        distribution=jc.prune.global_(),
    )
    assert not by_size["1"].any()  # magnitude empties the small layer at 90 % already


def model(params, x):
    heads = jnp.einsum("td,dhs->ths", x, params["query"])
    mixed = jnp.einsum("ths,hsd->td", heads, params["out"])
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), mixed, params["stack"])[0]
    return x @ params["linear"].T + params["bias"]


def model_params():
    rng = np.random.default_rng(5)
    shapes = {"query": (6, 2, 3), "out": (2, 3, 6), "stack": (2, 6, 6), "linear": (4, 6)}
    made = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return made | {"bias": np.zeros(4, np.float32)}


def test_wanda_is_the_weight_times_the_norm_of_its_input():
    params = model_params()
    rng = np.random.default_rng(6)
    data = [rng.normal(size=(5, 6)).astype(np.float32) for _ in range(2)]
    found = jc.prune.wanda(model, params, iter(data))
    w = {k: np.asarray(v, np.float64) for k, v in params.items()}
    x = np.concatenate(data).astype(np.float64)
    norm = lambda rows: np.sqrt((rows**2).sum(0))
    want = {"query": abs(w["query"]) * norm(x)[:, None, None]}
    heads = np.einsum("td,dhs->ths", x, w["query"])
    want["out"] = abs(w["out"]) * norm(heads)[..., None]
    x = np.einsum("ths,hsd->td", heads, w["out"])
    stacked = []
    for layer in w["stack"]:
        stacked.append(abs(layer) * norm(x)[:, None])
        x = np.tanh(x @ layer)
    want["stack"] = np.stack(stacked)
    want["linear"] = abs(w["linear"]) * norm(x)
    assert isinstance(found["bias"], optax.MaskedNode)
    for k, exact in want.items():
        np.testing.assert_allclose(found[k], exact, rtol=2e-5, err_msg=k)  # sums of ten squares


def test_wanda_names_what_it_cannot_score():
    params = model_params()
    x = np.ones((2, 6), np.float32)
    with pytest.raises(ValueError, match="wanda cannot score 'bias'"):
        jc.prune.wanda(model, params, [x], rules=["bias"])
    unused = {"w": jnp.ones((6, 2)), "other": jnp.ones((6, 2))}
    fn = lambda p, x: x @ p["w"] + jax.lax.stop_gradient(x @ p["other"])
    with pytest.raises(ValueError, match="'other' comes from no activations"):
        jc.prune.wanda(fn, unused, [x])


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "wanda"])
def test_no_batches(name):
    with pytest.raises(ValueError, match=f"{name} got no batches"):
        getattr(jc.prune, name)(loss, weights(), [])


def test_rounds_prune_the_same_share_and_nothing_comes_back():
    params = {"w": jnp.asarray(np.random.default_rng(7).normal(size=(20, 50)), jnp.float32)}
    seen = []

    def score(p, masks):
        seen.append(np.asarray(masks["w"]))
        assert ((np.asarray(p["w"]) != 0) == seen[-1]).all()
        # Scores that change their order from round to round.
        return {"w": jnp.abs(jnp.sin(params["w"] * 10 * len(seen)))}

    masks = jc.prune.iterative(score, params, jc.prune.unstructured(), 0.9, rounds=4)
    seen.append(np.asarray(masks["w"]))
    counts = [np.count_nonzero(m) for m in seen]
    want = [1000 - int(np.floor(1000 * (1 - 0.1 ** (r / 4)) + 0.5)) for r in range(5)]
    assert counts == want
    for before, after in itertools.pairwise(seen):
        assert not (after & ~before).any()


def test_a_lottery_ticket_is_what_was_there_before_training():
    params = {"w": jnp.asarray(np.random.default_rng(8).normal(size=(8, 8)), jnp.float32)}
    target = np.random.default_rng(9).normal(size=(8, 8)).astype(np.float32)

    def train(start, masks):
        # The larger the target, the larger the trained weight; zeros stay.
        return {"w": jnp.where(masks["w"], start["w"] * 0 + target, 0.0)}

    ticket, masks = jc.prune.lottery_ticket(train, params, jc.prune.unstructured(), 0.75, rounds=3)
    [want] = oracles.keep_largest([abs(target)], 16)
    np.testing.assert_array_equal(masks["w"], want)
    np.testing.assert_array_equal(ticket["w"], np.where(want, params["w"], 0))
    with pytest.raises(ValueError, match="one or more; got 0"):
        jc.prune.lottery_ticket(train, params, jc.prune.unstructured(), 0.5, rounds=0)


def test_apply_refuses_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"'w' has the shape \(2, 2\), its mask \(4,\)"):
        jc.prune.apply({"w": jnp.ones((2, 2))}, {"w": jnp.ones(4, bool)})
