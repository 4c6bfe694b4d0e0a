"""Selecting over eight devices: the same mask as on one, and nothing is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxcompress as jc
import oracles_pruning as oracles
from jaxcompress.prune._select import COLD, keep_largest


def place(x, *spec):
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def compiled(fn, *args):
    """The program after partitioning, and what it computes."""
    program = jax.jit(fn).lower(*args).compile()
    return program.as_text(), program(*args)


def assert_nothing_gathered(text):
    # Counts are added up over the devices, and nothing larger moves.
    assert "all-reduce" in text
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text


@pytest.mark.parametrize("spec", [("devices", None), (None, "devices")])
def test_mask_of_sharded_scores(spec):
    assert len(jax.devices()) == 8
    scores = np.random.default_rng(0).integers(0, 9, (64, 40)).astype(np.float32)  # many ties
    text, (masks, _) = compiled(lambda s: keep_largest([s], 1000, COLD), place(scores, *spec))
    np.testing.assert_array_equal(masks[0], oracles.keep_largest([scores], 1000)[0])
    assert masks[0].sharding.spec == PartitionSpec(*spec)
    assert_nothing_gathered(text)


def test_several_arrays_of_different_shardings():
    random = np.random.default_rng(1)
    scores = [random.integers(0, 5, s).astype(np.float32) for s in ((32, 8), (16,), (8, 24))]
    placed = [place(s, *p) for s, p in zip(scores, [("devices",), (), (None, "devices")])]
    text, (masks, _) = compiled(lambda *s: keep_largest(s, 200, COLD), *placed)
    for mask, want in zip(masks, oracles.keep_largest(scores, 200)):
        np.testing.assert_array_equal(mask, want)
    assert_nothing_gathered(text)


@pytest.mark.parametrize("wrap", ["prune", "sparsify"])
def test_a_training_step_gathers_nothing(wrap):
    parts = jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(0.75)
    if wrap == "prune":
        tx = optax.chain(optax.sgd(0.1, momentum=0.9), jc.prune.prune(*parts))
    else:
        tx = jc.prune.sparsify(optax.sgd(0.1, momentum=0.9), *parts)
    params = {"w": np.random.default_rng(2).integers(-9, 9, (64, 16)).astype(np.float32)}
    grads = {"w": np.full((64, 16), 0.5, np.float32)}

    def step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    want, state = jax.jit(step)(params, grads, tx.init(jax.tree.map(jnp.asarray, params)))
    split = jax.tree.map(lambda x: place(x, "devices"), params)
    text, (got, _) = compiled(
        step, split, jax.tree.map(lambda x: place(x, "devices"), grads), tx.init(split)
    )
    np.testing.assert_array_equal(got["w"], want["w"])
    assert np.count_nonzero(got["w"]) <= 256 == np.count_nonzero(jc.prune.masks(state)["w"])
    assert_nothing_gathered(text)
