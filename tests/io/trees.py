"""Trees to save: every container, every dtype, and a model that uses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc

BATCH = np.random.default_rng(9).normal(size=(24, 16)).astype(np.float32)

NAMES = ("int8", "int4", "int3", "w8a8", "pruned", "asymmetric", "shared", "shared_pruned", "thin")


def model(params, x):
    for name in NAMES:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["twin"]


@functools.cache
def compressed():
    """One layer in each format, sixteen by sixteen."""
    random = np.random.default_rng(0)
    dense = lambda: {
        "kernel": jnp.asarray(random.normal(size=(16, 16)), jnp.float32),
        "bias": jnp.asarray(random.normal(size=16), jnp.bfloat16),
    }
    params = {name: dense() for name in NAMES} | {"twin": dense()["kernel"]}
    stats = jc.calibrate(model, params, [BATCH], jc.statistics.absmax())
    rules = {
        "int8/kernel": jc.quantize.int8(),
        "int4/kernel": jc.quantize.int4(group_size=5),
        "int3/kernel": jc.quantize.int3(axis=(-2, -1)),
        "w8a8/kernel": jc.quantize.w8a8(static=True),
        "pruned/kernel": jc.quantize.int4(),
        "asymmetric/kernel": jc.quantize.int4(symmetric=False),
    }
    masks = jc.prune.mask(params, jc.prune.unstructured(), 0.8, rules=[".*pruned/kernel"])
    params = jc.quantize.quantize(params, rules, stats=stats)
    shared = {"shared.*/kernel": jc.quantize.codebook(bits=3)}
    params = jc.quantize.share(params, shared, masks=masks)
    params = jc.prune.pack(params, masks)
    params = jc.prune.low_rank(params, ["thin/kernel"], rank=3)
    return jc.quantize.prepare_qat(params, {"twin": jc.quantize.w4a8()}, learn_scale=True)


def assert_same(got, want):
    """The same structure, static fields, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
