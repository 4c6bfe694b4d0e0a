"""The contract of `prune` and `sparsify`, over optimizers and the wrappers around them.

After every applied update: as many weights as the schedule says, exact zeros elsewhere, and a
state whose structure and dtypes are those that `init` made.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
import oracles_pruning as oracles
from checks import random

SPARSITY = 0.7
PARTS = jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(SPARSITY)


def parameters():
    """float32 and bfloat16 in one tree; with ties, some of them zero; thirds have all digits."""
    whole = lambda *shape, seed: np.round(2 * random(*shape, seed=seed)) / np.float32(3)
    return {
        "single": jnp.asarray(whole(7, 5, seed=0)),
        "half": jnp.asarray(whole(6, 6, seed=1), jnp.bfloat16),
        "bias": jnp.asarray(whole(5, seed=2)),
    }


def gradients(step):
    """Few values, so that many weights move alike and stay tied."""
    make = lambda p: jnp.asarray(np.sign(random(*p.shape, seed=step)), p.dtype)
    return jax.tree.map(make, parameters())


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.5),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "muon": lambda: optax.contrib.muon(0.1),
    "wider-updates": lambda: cast(jnp.float32),
    "narrower-updates": lambda: cast(jnp.bfloat16),
}


def cast(dtype):
    """Updates in another dtype than the parameters, with digits that bfloat16 has not."""
    return optax.stateless(lambda g, p: jax.tree.map(lambda g: (g * 0.3).astype(dtype), g))


def prune(inner, **kwargs):
    return optax.chain(inner, jc.prune.prune(*PARTS, **kwargs))


def sparsify(inner, **kwargs):
    return jc.prune.sparsify(inner, *PARTS, **kwargs)


def ramped(inner):
    """More is pruned at each step, so that there are moments to clear."""
    criterion, pattern, _ = PARTS
    ramp = jc.prune.polynomial(SPARSITY, begin=0, end=2)
    return jc.prune.sparsify(inner, criterion, pattern, ramp)


def labels(params):
    return {k: "pruned" if v.ndim == 2 else "plain" for k, v in params.items()}


def inject(form):
    make = lambda learning_rate: form(optax.sgd(learning_rate))
    return optax.inject_hyperparams(make)(learning_rate=0.1)


# What goes around: a function of the form of pruning. A chain is `prune` itself.
WRAPPERS = {
    "in-chain": lambda form: optax.chain(optax.clip_by_global_norm(1.0), form(optax.adam(0.1))),
    "in-named_chain": lambda form: optax.named_chain(
        ("clip", optax.clip(0.5)), ("pruned", form(optax.adam(0.1)))
    ),
    "in-MultiSteps": lambda form: optax.MultiSteps(form(optax.adam(0.1)), every_k_schedule=2),
    "in-multi_transform": lambda form: optax.multi_transform(
        {"pruned": form(optax.adam(0.1)), "plain": optax.sgd(0.1)}, labels
    ),
    "in-masked": lambda form: optax.masked(
        form(optax.adam(0.1)), lambda p: jax.tree.map(lambda x: x.ndim == 2, p)
    ),
    "in-inject_hyperparams": inject,
    "in-apply_if_finite": lambda form: optax.apply_if_finite(form(optax.adam(0.1)), 3),
    "in-skip_not_finite": lambda form: optax.MultiSteps(
        form(optax.sgd(0.1)), 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "around-schedule_free": lambda form: form(optax.contrib.schedule_free_sgd(0.1)),
    "around-flatten": lambda form: form(optax.flatten(optax.adam(0.1))),
    "around-masked": lambda form: form(
        optax.masked(optax.trace(0.9), lambda p: jax.tree.map(lambda x: x.ndim == 2, p))
    ),
}
FORMS = {"prune": prune, "sparsify": sparsify}
CASES = {
    f"{form}-{name}": (lambda f, o: lambda: f(o()))(make, OPTIMIZERS[name])
    for form, make in {"prune": prune, "sparsify": ramped}.items()
    for name in OPTIMIZERS
} | {
    f"{form}-{name}": (lambda f, w: lambda: w(f))(FORMS[form], WRAPPERS[name])
    for form in FORMS
    for name in WRAPPERS
}


def structure(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def assert_pruned(params, masks):
    """Exactly as many kept as stated, exact zeros where nothing is kept, no other leaf masked."""
    for name in ("single", "half"):
        mask, w = np.asarray(masks[name]), np.asarray(params[name], np.float32)
        assert mask.dtype == bool
        assert np.count_nonzero(mask) == oracles.kept(str(SPARSITY), w.size)
        assert not w[~mask].any()
    assert isinstance(masks["bias"], optax.MaskedNode)


def assert_clean(state, masks):
    """What is remembered of a pruned weight is zero: every array of a weight's shape."""
    by_shape = {masks[name].shape: np.asarray(masks[name]) for name in ("single", "half")}
    for leaf in jax.tree.leaves(state):
        mask = by_shape.get(leaf.shape)
        if mask is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            assert not np.asarray(leaf, np.float32)[~mask].any()


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    tx, params = CASES[name](), parameters()
    state = tx.init(params)
    before = structure((params, state))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    changed = False
    for i in range(4):
        params, state, updates = step(params, state, gradients(i))
        masks = jc.prune.masks(state)
        for name in ("single", "half"):  # in between applied updates the masks hold as well
            assert not np.asarray(params[name], np.float32)[~np.asarray(masks[name])].any()
        changed |= bool(np.any(updates["single"]))
    assert changed
    assert_pruned(params, masks)
    assert structure((params, state)) == before
    if name.startswith("sparsify"):
        assert_clean(state, masks)
    assert all(np.isfinite(np.asarray(p, np.float32)).all() for p in params.values())
