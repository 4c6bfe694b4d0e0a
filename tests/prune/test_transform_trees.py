"""The trees that people train: Linen, NNX, Equinox, a TrainState, stacked seeds."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxcompress as jc
import oracles_pruning as oracles
from checks import random

PARTS = jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(0.75)
FORMS = {
    "prune": lambda: optax.chain(optax.adam(0.1), jc.prune.prune(*PARTS)),
    "sparsify": lambda: jc.prune.sparsify(optax.adam(0.1), *PARTS),
}
X = random(4, 6)


def assert_a_quarter_is_left(weights):
    assert weights
    for w in weights:
        assert np.count_nonzero(w) == oracles.kept("0.75", np.size(w))


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def tx(request):
    return request.param()


def test_linen_and_a_train_state(tx):
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
    params = model.init(jax.random.key(0), X)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = state.replace(step=jnp.int32(0))  # a Python 0 would compile twice

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state):
        grads = jax.grad(lambda p: jnp.sum(state.apply_fn(p, X) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(2):
        state = step(state)
    layers = state.params["params"].values()
    assert_a_quarter_is_left([layer["kernel"] for layer in layers])
    assert all(np.all(layer["bias"] != 0) for layer in layers)


def test_nnx(tx):
    model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(X) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer)
    assert_a_quarter_is_left([layer.kernel[...] for layer in model.layers])
    masks = jc.prune.masks(optimizer.opt_state)
    kept = [np.count_nonzero(m) for m in jax.tree.leaves(masks)]
    assert kept == [oracles.kept("0.75", 48), oracles.kept("0.75", 24)]


def test_equinox(tx):
    model = eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        loss = lambda p: jnp.sum(jax.vmap(eqx.combine(p, static))(X) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return eqx.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(params, state)
    assert_a_quarter_is_left([layer.weight for layer in params.layers])
    masks = jc.prune.masks(state)
    assert masks.layers[0].weight.shape == (8, 6)
    assert isinstance(masks.layers[0].bias, optax.MaskedNode)


def test_fake_quantized_weights(tx):
    params = jc.quantize.prepare_qat(
        {"w": jnp.asarray(random(6, 8)), "b": jnp.ones(8)},
        {"w": jc.quantize.int4()},
        learn_scale=True,
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(2):
        grads = jax.tree.map(lambda x, i=i: jnp.full_like(x, 0.1 * i), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_a_quarter_is_left([params["w"].weight])
    assert np.all(params["w"].scale != 0)
    assert not np.any(params["w"].convert().codes()[~jc.prune.masks(state)["w"]])


def test_seeds_side_by_side(tx):
    """Each of the stacked seeds gets the mask that it gets alone."""
    params = {"w": jnp.asarray(random(3, 8, 5))}
    grads = {"w": jnp.asarray(random(3, 8, 5, seed=1))}

    def step(params, grads):
        updates, state = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates), jc.prune.masks(state)

    got = jax.jit(jax.vmap(step))(params, grads)
    alone = jax.jit(step)
    for i in range(3):
        want = alone(*jax.tree.map(lambda x, i=i: x[i], (params, grads)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), got, want)


def test_saved_in_the_middle_and_continued(tx):
    """A state is a plain pytree of arrays: copied through numpy, it goes on alike."""
    params = {"w": jnp.asarray(random(8, 5))}
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    leaves, treedef = jax.tree.flatten(state)
    copy = jax.tree.unflatten(treedef, [jnp.asarray(np.array(x)) for x in leaves])
    for a, b in zip(*(jax.tree.leaves(update(params, s, params)) for s in (state, copy))):
        np.testing.assert_array_equal(a, b)
