"""`layout`: which axes each weight contracts, as the frameworks really use them."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxcompress as jc
from checks import made, random
from jaxcompress._layout import Layout


def linen(model, *args):
    variables = model.init(jax.random.key(0), *args)
    return jc.layout(model.apply, variables, *args)["params"]


def axes(found):
    return found.contract, found.output, found.batch


def test_flax_dense_contracts_the_second_last():
    found = linen(nn.Dense(4), np.ones((2, 8)))
    assert found["kernel"] == Layout((-2,), (-1,), ())
    assert found["bias"] is None


def test_equinox_linear_contracts_the_last():
    model = eqx.nn.Linear(8, 4, key=jax.random.key(0))
    fn = lambda model, x: jax.vmap(model)(x)
    assert axes(jc.layout(fn, model, np.ones((2, 8))).weight) == ((-1,), (-2,), ())


def test_haiku_and_nnx():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(4)(x)))
    x = np.ones((2, 8), np.float32)
    params = model.init(jax.random.key(0), x)
    assert axes(jc.layout(model.apply, params, x)["linear"]["w"]) == ((-2,), (-1,), ())
    found = jc.layout(lambda model, x: model(x), nnx.Linear(8, 4, rngs=nnx.Rngs(0)), x)
    assert found.kernel.get_value() == Layout((-2,), (-1,), ())


def test_attention():
    x = np.ones((2, 6, 32))
    found = linen(nn.MultiHeadDotProductAttention(num_heads=4), x)
    for name in ("query", "key", "value"):
        assert axes(found[name]["kernel"]) == ((-3,), (-2, -1), ())
    assert axes(found["out"]["kernel"]) == ((-3, -2), (-1,), ())


def test_convolution():
    found = linen(nn.Conv(6, (3, 3)), np.ones((1, 8, 8, 4)))
    assert axes(found["kernel"]) == ((-4, -3, -2), (-1,), ())
    conv = eqx.nn.Conv2d(4, 6, 3, key=jax.random.key(0))
    assert axes(jc.layout(lambda m, x: m(x), conv, np.ones((4, 8, 8))).weight) == (
        (-3, -2, -1),
        (-4,),
        (),
    )


@pytest.mark.parametrize(
    ("fn", "x"),
    [
        (lambda p, x: jnp.einsum("end,edf->enf", x, p["w"]), np.ones((3, 5, 8))),
        (lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]), np.ones((3, 5, 8))),
        (lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 2, 1])), np.ones((5, 8))),
        (lambda p, x: jnp.einsum("nd,ndf->nf", x, p["w"][jnp.arange(5) % 3]), np.ones((5, 8))),
        (lambda p, x: lax.scan(lambda x, w: (x @ w @ w.T, None), x, p["w"])[0], np.ones((5, 8))),
        (lambda p, x: x @ p["w"][1], np.ones((5, 8))),
    ],
    ids=["einsum", "vmap", "ragged_dot", "looked up", "scan both ways", "picked"],
)
def test_experts_and_layers(fn, x, request):
    found = jc.layout(fn, {"w": np.ones((3, 8, 4), np.float32)}, x)["w"]
    if "scan both ways" in request.node.callspec.id:
        assert found.contract is None
        assert "[(-2,), (-1,)]" in found.why
    else:
        assert axes(found) == ((-2,), (-1,), (-3,))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8)(x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan()(x, None)[0]


def test_scanned_layers():
    [block] = linen(Stack(), np.ones((2, 8))).values()
    assert axes(block["Dense_0"]["kernel"]) == ((-2,), (-1,), (-3,))


class Tied(nn.Module):
    attend: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 32)
        return embed.attend(embed(tokens)) if self.attend else embed(tokens)


@pytest.mark.parametrize("attend", [False, True])
def test_a_table_has_a_scale_for_each_row(attend):
    """Alone or tied to a product: of the two the product decides, and it agrees."""
    found = linen(Tied(attend), np.arange(4))["Embed_0"]["embedding"]
    assert found.contract == (-1,)


def test_disagreement_says_which():
    w = {"w": np.ones((8, 8), np.float32)}
    found = jc.layout(lambda p, x: x @ p["w"] @ p["w"].T, w, np.ones((2, 8)))["w"]
    assert found == Layout(None, why="its products contract different axes: [(-2,), (-1,)]")
    with pytest.raises(ValueError, match=r"no contracting axes for 'w' \(its products contract"):
        jc.quantize.quantize(w, {"w": jc.quantize.int8()}, layout={"w": found})


@jax.custom_vjp
def opaque(w):
    return w


opaque.defvjp(lambda w: (w, None), lambda _, g: (g,))


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda p, x: x, "it meets no product, only nothing"),
        (lambda p, x: x @ (p["w"] * 2), "it meets no product, only mul"),
        (lambda p, x: x @ jnp.sort(p["w"]), "it meets no product, only sort"),
        (lambda p, x: x @ opaque(p["w"]), "it meets no product, only custom_vjp_call"),
        (lambda p, x: x @ p["w"][::-1] + p["w"].sum(), "it meets no product, only reduce_sum"),
    ],
)
def test_no_product_says_what_was_met(fn, why):
    found = jc.layout(fn, {"w": np.ones((8, 8), np.float32)}, np.ones((2, 8)))["w"]
    assert found.contract is None
    assert found.why.startswith(why)


VIEWS = {
    "transpose": lambda w: w.T,
    "reshape": lambda w: w.reshape(8, 2, 4).reshape(8, 8).T,
    "slice": lambda w: w[2:6].T,
    "strided": lambda w: w[::2].T,
    "dynamic slice": lambda w: lax.dynamic_slice_in_dim(w, 2, 4, 0).T,
    "squeeze": lambda w: jnp.squeeze(w[None], 0).T,
    "cast": lambda w: w.astype(jnp.bfloat16).T,
    "copy": lambda w: jnp.array(w, copy=True).T,
    "stop_gradient": lambda w: lax.stop_gradient(w).T,
    "barrier": lambda w: lax.optimization_barrier(w).T,
    "checkpoint": lambda w: jax.checkpoint(lambda w: w.T)(w),
    "concatenate": lambda w: jnp.concatenate([w, w, jnp.ones((2, 8))]).T,
}


@pytest.mark.parametrize("name", VIEWS)
def test_through_views(name):
    fn = lambda p, x: x @ VIEWS[name](p["w"])
    found = jc.layout(fn, {"w": np.ones((8, 8), np.float32)}, np.ones((2, 8)))["w"]
    assert axes(found) == ((-1,), (-2,), ())


def test_each_of_concatenated_weights_has_its_layout():
    params = {name: np.ones((8, 4), np.float32) for name in "abc"}
    fn = lambda p, x: (x @ jnp.concatenate([p["a"], p["b"]], 1), x @ p["c"])
    assert {axes(found) for found in jc.layout(fn, params, np.ones((2, 8))).values()} == {
        ((-2,), (-1,), ())
    }


def test_every_call_sees_what_the_first_saw():
    """JAX remembers jitted functions; a second layout must not come out empty."""
    inner = jax.jit(lambda w, x: x @ w)
    fn = lambda p, x: inner(p["w"], x)
    for _ in range(3):
        found = jc.layout(fn, {"w": np.ones((8, 4), np.float32)}, np.ones((2, 8)))
        assert found["w"].contract == (-2,)


def test_compressed_leaves_and_abstract_arguments():
    fn = lambda p, x: x @ p["w"]
    x = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    assert jc.layout(fn, {"w": made((8, 4))}, x)["w"].contract == (-2,)
    w = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    assert jc.layout(fn, {"w": w}, x)["w"].contract == (-2,)


def test_a_layout_keeps_attention_compressed_and_right():
    """What it is for: the default axis -2 would be wrong for three of the four kernels."""
    x = random(2, 6, 32)
    model = nn.MultiHeadDotProductAttention(num_heads=4)
    variables = model.init(jax.random.key(0), x)
    found = jc.layout(model.apply, variables, x)
    q = jc.quantize.quantize(variables, {".*kernel": jc.quantize.int4()}, layout=found)
    shapes = {name: p["kernel"].scale.shape for name, p in q["params"].items()}
    assert shapes == dict.fromkeys(("query", "key", "value"), (1, 4, 8)) | {"out": (1, 1, 32)}
