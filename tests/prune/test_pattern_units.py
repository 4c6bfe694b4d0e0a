"""Blocks, channels, rows, columns, outputs: units as loops find them."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles_pruning as oracles


def whole_numbers(*shape, seed=0):
    """Scores whose means are exact in float32 wherever the count is a power of two."""
    return np.random.default_rng(seed).integers(-50, 50, shape).astype(np.float32)


def mask_of_units(scores, groups, kept):
    """The mask that keeps the `kept` groups (lists of indices) of the largest mean."""
    means = np.array([np.mean([scores[i] for i in group], dtype=np.float64) for group in groups])
    [chosen] = oracles.keep_largest([means], kept)
    mask = np.zeros(scores.shape, bool)
    for group, keep in zip(groups, chosen):
        for index in group:
            mask[index] = keep
    return mask


def grouped(shape, label):
    """Indices of `shape` by `label(index)`, in the order in which labels first occur."""
    groups = {}
    for index in np.ndindex(*shape):
        groups.setdefault(label(index), []).append(index)
    return list(groups.values())


CASES = {
    "block": (jc.prune.block(2, 4), lambda i: (*i[:-2], i[-2] // 2, i[-1] // 4)),
    "channel": (jc.prune.channel(), lambda i: i[-1]),
    "channel of axis 0": (jc.prune.channel(axis=0), lambda i: i[0]),
    "channels of two axes": (jc.prune.channel(axis=(-2, -1)), lambda i: i[-2:]),
    "heads of two": (jc.prune.heads(4, axis=-2), lambda i: i[-2] // 2),
    "row": (jc.prune.row(), lambda i: i[:-1]),
    "column": (jc.prune.column(), lambda i: (*i[:-2], i[-1])),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(8, 16), (2, 8, 4)], ids=str)
@pytest.mark.parametrize("sparsity", ["0.3", "0.75"])
def test_units_are_kept_as_a_whole_by_their_mean(name, shape, sparsity):
    pattern, label = CASES[name]
    scores = whole_numbers(*shape)
    groups = grouped(shape, label)
    want = mask_of_units(scores, groups, oracles.kept(sparsity, len(groups)))
    found = jc.prune.mask(jnp.asarray(scores), pattern, float(sparsity))
    np.testing.assert_array_equal(found, want)


@hypothesis.settings(max_examples=12)  # each shape compiles anew
@hypothesis.given(*(st.integers(1, 9) for _ in range(4)), st.integers(0, 5))
def test_blocks_at_the_edges_are_smaller(rows, columns, height, width, seed):
    # One positive number a block, elsewhere zeros: rounding of the means decides nothing.
    scores = np.zeros((rows, columns), np.float32)
    scores[::height, ::width] = 1 + np.random.default_rng(seed).random(
        scores[::height, ::width].shape
    )
    groups = grouped(scores.shape, lambda i: (i[0] // height, i[1] // width))
    kept = oracles.kept("0.5", len(groups))
    found = jc.prune.mask(jnp.asarray(scores), jc.prune.block(height, width), 0.5)
    np.testing.assert_array_equal(found, mask_of_units(scores, groups, kept))


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (-1, 0)], ids=str)
def test_each_output_keeps_the_same_number(axis):
    scores = whole_numbers(3, 4, 5)
    found = jc.prune.mask(jnp.asarray(scores), jc.prune.unstructured(axis=axis), 0.5)
    contract = [a % 3 for a in ([axis] if isinstance(axis, int) else axis)]
    others = [d for d in range(3) if d not in contract]
    permutation = [*others, *contract]
    turned, mask = (np.transpose(a, permutation) for a in (scores, np.asarray(found)))
    lead = turned.shape[: len(others)]
    for index in np.ndindex(*lead):
        want = oracles.keep_largest([turned[index]], oracles.kept("0.5", turned[index].size))
        np.testing.assert_array_equal(mask[index], want[0])


def model(params, x):
    heads = jnp.einsum("td,dhs->ths", x, params["query"])
    mixed = jnp.einsum("ths,hsd->td", heads, params["out"])
    return jax.lax.scan(lambda x, w: (x @ w, None), mixed, params["stack"])[0]


def test_a_layout_names_the_axes():
    shapes = {"query": (8, 2, 4), "out": (2, 4, 8), "stack": (3, 8, 8)}
    scores = {k: whole_numbers(*s, seed=len(k)) for k, s in shapes.items()}
    found = jc.layout(model, scores, jnp.ones((3, 8)))
    labels = {"query": lambda i: i[1:], "out": lambda i: i[2], "stack": lambda i: (i[0], i[2])}
    channels = jc.prune.mask(scores, jc.prune.channel(layout=found), 0.5)
    for path, label in labels.items():
        groups = grouped(shapes[path], label)
        want = mask_of_units(scores[path], groups, oracles.kept("0.5", len(groups)))
        np.testing.assert_array_equal(channels[path], want, path)
    outputs = jc.prune.mask(scores, jc.prune.unstructured(layout=found), 0.75)
    axes = {"query": 0, "out": (0, 1), "stack": 1}
    for path, axis in axes.items():
        kept = np.asarray(outputs[path]).sum(axis)
        assert (kept == np.prod(np.take(shapes[path], axis)) // 4).all(), path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jc.prune.block(0, 4), "1 or more; got 0, 4"),
        (lambda: jc.prune.heads(0), "1 or more; got 0"),
        (lambda: jc.prune.channel(axis=-1, layout={}), "channel takes axis= or layout="),
        (lambda: jc.prune.unstructured(axis=-1, layout={}), "unstructured takes axis= or layout="),
    ],
)
def test_what_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("pattern", [jc.prune.block(2, 2), jc.prune.row(), jc.prune.column()])
def test_a_vector_has_no_rows(pattern):
    with pytest.raises(ValueError, match=r"'net/b' has the shape \(4,\), and no rows"):
        jc.prune.mask({"net": {"b": jnp.ones(4)}}, pattern, 0.5, rules=["net/b"])


def test_an_axis_that_is_not_there_is_named_with_the_leaf():
    with pytest.raises(ValueError, match=r"channel along axis 2: 'w' has the shape \(4, 4\)"):
        jc.prune.mask({"w": jnp.ones((4, 4))}, jc.prune.channel(axis=2), 0.5)
    with pytest.raises(ValueError, match=r"heads\(3\) along axis -1: 'w' has the shape \(4, 4\)"):
        jc.prune.mask({"w": jnp.ones((4, 4))}, jc.prune.heads(3), 0.5)
