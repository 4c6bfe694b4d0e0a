"""`sparsegpt` against the optimal brain surgeon, one weight at a time, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
import oracles
import oracles_pruning
from jaxcompress import _compensate


def data(rows=60, k=12, seed=0):
    """Correlated inputs, so that weights can make up for each other."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, k)) @ rng.normal(size=(k, k))).astype(np.float32)


def surgeon(w, x, block, kept, ratio=None, damping=0.01, separate=False, array=None):
    """`w[outputs, inputs]` pruned in the order of its inputs.

    Of each output the inputs still to come are set to what is optimal (Hassibi and Stork,
    1993): with `F` those from `j` on, `w_F -= w_j inv(H_F)[:, 0] / inv(H_F)[0, 0]`. Every
    inverse is taken from scratch.

    With a quantized `array[inputs, outputs]`, what stays becomes what its codes say, and the
    inputs still to come make up for that too; each code must be the nearest one. The codes
    are followed, because behind a tie that float32 decided the other way all would differ.
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
            mask[:, columns] = oracles_pruning.nm_mask(scores, *ratio, -1)
        if ratio is None and j % block == 0:
            columns = range(j, min(k, j + block))
            scores = np.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in columns], -1)
            number = kept[j // block]
            if separate:
                mask[:, columns] = [oracles_pruning.keep_largest([s], number)[0] for s in scores]
            else:
                [mask[:, columns]] = oracles_pruning.keep_largest([scores], number)
        value = np.where(mask[:, j], w[:, j], 0.0)
        if array is not None:
            codes, scale = oracles.codes_of(array)[j], np.broadcast_to(array.scale, (k, outputs))[j]
            inside = np.clip(value / scale, array.qtype.low, array.qtype.high)
            # Half a code for rounding; float32 sums of this size are right to 1e-3 of a code.
            assert np.abs(inside - codes).max() < 0.5 + 1e-3
            value = codes * np.asarray(scale, np.float64)
        inverse = inverses[j]
        w[:, j:] -= np.outer(w[:, j] - value, inverse[:, 0] / inverse[0, 0])
        w[:, j] = value
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
        fn, {"w": w}, [x[:30], x[30:]], pattern, sparsity, block_size=options["block"]
    )
    want, mask = surgeon(w.T, x, **options)
    np.testing.assert_array_equal(masks["w"], mask.T)
    assert (np.asarray(pruned["w"])[~mask.T] == 0).all()
    # float32 solves with a matrix whose condition number is some thousands.
    np.testing.assert_allclose(pruned["w"], want.T, atol=2e-3)
    if options["kept"] and "separate" not in options:
        assert np.count_nonzero(masks["w"]) == oracles_pruning.kept(str(sparsity), 60)


@pytest.mark.parametrize("name", ["blocks that do not divide", "each output", "2:4"])
def test_both_is_the_surgeon_who_rounds(name):
    pattern, sparsity, options = CASES[name]
    x, w = data(), np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)
    q, masks = jc.prune.sparsegpt(
        lambda p, x: x @ p["w"],
        {"w": w},
        [x],
        pattern,
        sparsity,
        quantize=jc.quantize.int4(),
        block_size=options["block"],
    )
    want, mask = surgeon(w.T, x, **options, array=q["w"])
    np.testing.assert_array_equal(masks["w"], mask.T)
    np.testing.assert_allclose(q["w"].materialise(), want.T, rtol=1e-6)
    packed = jc.prune.pack(q, masks, pattern=pattern)["w"]
    np.testing.assert_array_equal(packed.materialise(), q["w"].materialise())


def test_a_layer_sees_the_layers_before_it_pruned():
    """Two of a scan, and one behind them, of which the first is not quantized."""

    def fn(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])
        return x @ p["last"].T

    x, rng = data(60, 8), np.random.default_rng(1)
    params = {"stack": rng.normal(size=(2, 8, 8)) / 4, "last": rng.normal(size=(4, 8))}
    params = jax.tree.map(jnp.float32, params)
    half = jc.prune.nm(2, 4, layout=jc.layout(fn, params, x))
    new, masks = jc.prune.sparsegpt(
        fn, params, [x[:30], x[30:]], half, 1.0, quantize={"last": jc.quantize.int8()}
    )
    assert new["stack"].shape == (2, 8, 8)
    for i in range(2):
        want, mask = surgeon(params["stack"][i].T, x, 8, None, (2, 4))
        np.testing.assert_array_equal(masks["stack"][i], mask.T)
        # As above.
        np.testing.assert_allclose(new["stack"][i], want.T, atol=2e-3)
        x = np.tanh(x @ np.asarray(new["stack"][i]))
    turned = jax.tree.map(jnp.transpose, new["last"])
    last = jc.arrays.QuantizedArray(
        turned.values, turned.scale, qtype=new["last"].qtype, axis=(-2,)
    )
    _, mask = surgeon(params["last"], x, 8, None, (2, 4), array=last)
    np.testing.assert_array_equal(masks["last"], mask)


def test_each_layer_has_the_sparsity_of_its_rule():
    rng = np.random.default_rng(6)
    params = {n: {"kernel": jnp.float32(rng.normal(size=(8, 8)))} for n in "abc"}
    x = data(60, 8)

    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]) @ p["c"]["kernel"]

    # The first rule that matches counts, and None leaves a layer alone.
    rules = {"b.*": 0.25, "c/kernel": None, ".*kernel": 0.5}
    new, masks = jc.prune.sparsegpt(fn, params, [x], jc.prune.unstructured(), rules)
    assert new["c"]["kernel"] is params["c"]["kernel"]
    assert isinstance(masks["c"]["kernel"], optax.MaskedNode)
    for name, kept in {"a": 32, "b": 48}.items():
        want, mask = surgeon(params[name]["kernel"].T, x, 8, [kept])
        np.testing.assert_array_equal(masks[name]["kernel"], mask.T)
        np.testing.assert_allclose(new[name]["kernel"], want.T, atol=2e-3)  # as above
        x = np.tanh(x @ np.asarray(new[name]["kernel"]))


def test_experts_have_activations_of_their_own():
    rng = np.random.default_rng(2)
    x, w = np.stack([data(seed=e) for e in range(2)]), rng.normal(size=(2, 12, 5))
    fn, params = lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"]), {"w": jnp.float32(w)}
    pattern = jc.prune.unstructured(layout=jc.layout(fn, params, x))
    new, masks = jc.prune.sparsegpt(fn, params, [x], pattern, 0.5, block_size=4)
    for e in range(2):
        want, mask = surgeon(w[e].T, x[e], 4, [2, 2, 2], separate=True)
        np.testing.assert_array_equal(masks["w"][e], mask.T)
        np.testing.assert_allclose(new["w"][e], want.T, atol=2e-3)  # as above


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    """And a layer of which the host hears in between has the same bits too."""
    rng = np.random.default_rng(4)
    params = {n: jnp.float32(rng.normal(size=(8, 8))) for n in "abc"}
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    x, reports = data(40, 8), []
    run = lambda **more: jc.prune.sparsegpt(
        fn,
        params,
        [x],
        jc.prune.unstructured(),
        0.5,
        rules=["a", "b"],
        quantize={"b": jc.quantize.int4()},
        block_size=3,
        **more,
    )
    want, masks = run(progress=reports.append)
    assert [type(r).__name__ for r in reports] == ["Finished"] * 2
    assert isinstance(masks["c"], optax.MaskedNode)

    def kill(report):
        raise KilledError

    with pytest.raises(KilledError):
        run(resume=tmp_path, progress=kill)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(_compensate, "_STEP", 1)  # a piece is one block
    reports.clear()
    for got in (run(resume=tmp_path), run(progress=reports.append)):
        assert jax.tree.structure(got) == jax.tree.structure((want, masks))
        jax.tree.map(np.testing.assert_array_equal, got, (want, masks))
    fractions = [r.fraction for r in reports]
    np.testing.assert_allclose(fractions, np.arange(1, 7) / 6)  # three blocks of each
    assert [r.layers for r in reports] == [("a",)] * 3 + [("b",)] * 3
    with pytest.raises(ValueError, match="a run with other weights"):
        run(resume=tmp_path, damping=0.02)


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
    spec = {"w": jc.quantize.int3()}
    after = jc.quantize.quantize(pruned, spec)["w"].materialise()
    both, _ = jc.prune.sparsegpt(fn, params, [x], pattern, 0.5, quantize=spec)
    assert error({"w": both["w"].materialise()}) < error({"w": after})


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
        ((DENSE, W, [X], jc.prune.unstructured(axis=-1), 0.5), "'w' is contracted along"),
        ((DENSE, W, [X], jc.prune.nm(1, 3, axis=-2), 1.0), "'w': 3 does not divide its 8 inputs"),
        ((DENSE, W, [], jc.prune.unstructured(), 0.5), "no batches"),
        ((DENSE, W, [X], jc.prune.unstructured(), 50), "fraction of zeros"),
        ((DENSE, W, [X], jc.prune.unstructured(), {"w": 50}), "fraction of zeros"),
        ((DENSE, W, [X], jc.prune.unstructured(), {"w": 0.5}), "leave rules= out"),
        ((DENSE, W, [X], jc.prune.nm(2, 4, axis=-2), {"w": None, ".*": 0.5}), "group of 2:4"),
        ((DENSE, W, [X * np.nan], jc.prune.unstructured(), 0.5), "'w' are not finite"),
        ((lambda p, x: x + p["w"].sum(), W, [X], jc.prune.unstructured(), 0.5), "cannot prune 'w'"),
    ],
)
def test_what_cannot_be_done_is_said(args, message):
    with pytest.raises(ValueError, match=message):
        jc.prune.sparsegpt(*args, rules=["w"])


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [({"w": None}, "nothing to prune; got {'w': None}"), ({"w": "x"}, "of 'w' is a fraction")],
)
def test_a_mapping_that_makes_no_sense_is_named(sparsity, message):
    with pytest.raises(ValueError, match=message):
        jc.prune.sparsegpt(DENSE, W, [X], jc.prune.unstructured(), sparsity)


@pytest.mark.parametrize(
    ("quantize", "error", "message"),
    [
        ({"v": jc.quantize.int4()}, ValueError, "names 'v', which is not pruned"),
        (jc.quantize.int4(symmetric=False), ValueError, "'w' is asymmetric"),
        (jc.quantize.nf4(), TypeError, "the spec of 'w' is nf4"),
        (jc.quantize.w8a8(static=True), ValueError, "needs stats="),
    ],
)
def test_what_cannot_be_quantized_is_said(quantize, error, message):
    params = W | {"v": np.ones((8, 4), np.float32)}
    fn = lambda p, x: x @ p["w"] + x @ p["v"]
    with pytest.raises(error, match=message):
        jc.prune.sparsegpt(
            fn, params, [X], jc.prune.unstructured(), 0.5, rules=["w"], quantize=quantize
        )
    fake = jc.quantize.prepare_qat(W, {"w": jc.quantize.int8()})
    with pytest.raises(TypeError, match="'w' is a FakeQuantArray"):
        jc.prune.sparsegpt(DENSE, fake, [X], jc.prune.unstructured(), 0.5, rules=["w"])
