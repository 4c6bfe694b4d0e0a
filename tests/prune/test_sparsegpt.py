"""`sparsegpt` against the optimal brain surgeon, one weight at a time, in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
import oracles_pruning as oracles


def data(rows=60, k=12, seed=0):
    """Correlated inputs, so that weights can make up for each other."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, k)) @ rng.normal(size=(k, k))).astype(np.float32)


def surgeon(w, x, block, kept, ratio=None, damping=0.01, separate=False):
    """`w[outputs, inputs]` pruned in the order of its inputs.

    Of each output the inputs still to come are set to what is optimal (Hassibi and Stork,
    1993): with `F` those from `j` on, `w_F -= w_j inv(H_F)[:, 0] / inv(H_F)[0, 0]`. Every
    inverse is taken from scratch.
    """
    w, x = np.array(w, np.float64), np.asarray(x, np.float64)
    outputs, k = w.shape
    h = x.T @ x
    h += damping * np.mean(np.diag(h)) * np.eye(k)
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(k)]
    mask = np.ones(w.shape, bool)
    for j in range(k):
        if ratio is not None and j % ratio[1] == 0:
            columns = range(j, j + ratio[1])
            scores = np.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in columns], -1)
            mask[:, columns] = oracles.nm_mask(scores, *ratio, -1)
        if ratio is None and j % block == 0:
            columns = range(j, min(k, j + block))
            scores = np.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in columns], -1)
            number = kept[j // block]
            if separate:
                mask[:, columns] = [oracles.keep_largest([s], number)[0] for s in scores]
            else:
                [mask[:, columns]] = oracles.keep_largest([scores], number)
        inverse = inverses[j]
        for o in range(outputs):
            if not mask[o, j]:
                w[o, j:] -= w[o, j] * inverse[:, 0] / inverse[0, 0]
                w[o, j] = 0
    return w, mask


CASES = {
    "one block": (jc.prune.unstructured(), 0.5, dict(block=12, kept=[30])),
    "blocks that do not divide": (jc.prune.unstructured(), 0.4, dict(block=5, kept=[15, 15, 6])),
    "each output": (
        jc.prune.unstructured(axis=-2),
        0.5,
        dict(block=4, kept=[2, 2, 2], separate=True),
    ),
    "2:4": (jc.prune.nm(2, 4, axis=-2), 1.0, dict(block=8, kept=None, ratio=(2, 4))),
    "1:3": (jc.prune.nm(1, 3, axis=-2), 1.0, dict(block=6, kept=None, ratio=(1, 3))),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_surgeon(name):
    pattern, sparsity, options = CASES[name]
    x = data()
    w = np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)
    fn = lambda p, x: x @ p["w"]
    pruned, masks = jc.prune.sparsegpt(
        fn, {"w": w}, [x[:20], x[20:]], pattern, sparsity, block_size=options["block"]
    )
    want, mask = surgeon(w.T, x, **options)
    np.testing.assert_array_equal(masks["w"], mask.T)
    assert (np.asarray(pruned["w"])[~mask.T] == 0).all()
    # float32 solves with a matrix whose condition number is some thousands.
    np.testing.assert_allclose(pruned["w"], want.T, atol=2e-3)
    if options["kept"] and "separate" not in options:
        assert np.count_nonzero(masks["w"]) == oracles.kept(str(sparsity), 60)


def test_outputs_change_less_than_by_magnitude_or_wanda():
    x = data(200, 32, seed=2)
    w = np.random.default_rng(3).normal(size=(32, 16)).astype(np.float32)
    fn, params = lambda p, x: x @ p["w"], {"w": w}
    pattern = jc.prune.unstructured(axis=-2)
    error = lambda p: float(np.sum((x @ (np.asarray(p["w"]) - w)) ** 2))
    by = {
        "magnitude": jc.prune.mask({"w": abs(w)}, pattern, 0.5),
        "wanda": jc.prune.mask(jc.prune.wanda(fn, params, [x]), pattern, 0.5),
    }
    errors = {k: error(jc.prune.apply(params, m)) for k, m in by.items()}
    pruned, _ = jc.prune.sparsegpt(fn, params, [x], pattern, 0.5)
    assert errors["wanda"] < errors["magnitude"]
    assert error(pruned) < 0.75 * errors["wanda"]


def model(params, x):
    heads = jnp.einsum("td,dhs->ths", x, params["query"])
    mixed = jnp.einsum("ths,hsd->td", heads, params["out"])
    x = jnp.tanh(mixed @ params["stack"][0])
    return (x @ params["stack"][1]) @ params["linear"].T + params["bias"]


def test_every_form_of_weight_and_what_is_left_alone():
    rng = np.random.default_rng(5)
    shapes = {"query": (8, 2, 4), "out": (2, 4, 8), "stack": (2, 8, 8), "linear": (4, 8)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    params |= {"bias": jnp.zeros(4), "table": jnp.ones((3, 3))}
    x = data(40, 8)
    found = jc.layout(model, params, x)
    pattern = jc.prune.nm(2, 4, layout=found)
    pruned, masks = jc.prune.sparsegpt(model, params, [x], pattern, 1.0)
    for k, axis in {"query": 0, "out": 1, "stack": 1, "linear": 1}.items():
        groups = np.moveaxis(np.asarray(masks[k]), axis, -1).reshape(-1, 4)
        assert (groups.sum(-1) == 2).all(), k
        assert (np.asarray(pruned[k]) != 0).sum() == masks[k].sum(), k
    for k in ("bias", "table"):
        assert isinstance(masks[k], optax.MaskedNode)
        assert pruned[k] is params[k]
    packed = jc.prune.pack(pruned, masks, pattern=pattern)
    assert isinstance(packed["out"], jc.arrays.NMSparseArray)
    # The query's inputs are x itself: the same as a plain matrix of them.
    flat = np.asarray(params["query"]).reshape(8, 8)
    want, mask = surgeon(flat.T, x, 8, None, (2, 4))
    np.testing.assert_array_equal(np.asarray(masks["query"]).reshape(8, 8), mask.T)
    np.testing.assert_allclose(np.asarray(pruned["query"]).reshape(8, 8), want.T, atol=2e-3)


def test_inputs_that_are_never_seen_go_first_and_few_rows_are_enough():
    x = data(3, 8)
    x[:, 2] = 0
    w = np.full((8, 4), 1e-2, np.float32)
    w[2] = 100.0
    fn = lambda p, x: x @ p["w"]
    pruned, masks = jc.prune.sparsegpt(fn, {"w": w}, [x], jc.prune.unstructured(), 0.5)
    assert not np.asarray(masks["w"])[2].any()
    assert np.isfinite(pruned["w"]).all()
    zero, _ = jc.prune.sparsegpt(fn, {"w": w}, [0 * x], jc.prune.unstructured(), 0.5)
    assert np.isfinite(zero["w"]).all()


W = {"w": np.ones((8, 4), np.float32)}
X = np.ones((2, 8), np.float32)
DENSE = lambda p, x: x @ p["w"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((DENSE, W, [X], jc.prune.block(2, 2), 0.5), r"got block\(2, 2\)"),
        ((DENSE, W, [X], jc.prune.nm(2, 4, axis=-2), 0.5), "every group of 2:4"),
        ((DENSE, W, [X], jc.prune.nm(2, 4, axis=-1), 1.0), "'w' is contracted along"),
        ((DENSE, W, [X], jc.prune.nm(1, 3, axis=-2), 1.0), "'w': 3 does not divide its 8 inputs"),
        ((DENSE, W, [], jc.prune.unstructured(), 0.5), "no batches"),
        ((DENSE, W, [X], jc.prune.unstructured(), 50), "fraction of zeros"),
        ((DENSE, W, [X * np.nan], jc.prune.unstructured(), 0.5), "'w' are not finite"),
        ((lambda p, x: x + p["w"].sum(), W, [X], jc.prune.unstructured(), 0.5), "cannot prune 'w'"),
    ],
)
def test_what_cannot_be_done_is_said(args, message):
    with pytest.raises(ValueError, match=message):
        jc.prune.sparsegpt(*args, rules=["w"])
