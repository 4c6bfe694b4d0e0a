"""`intermediates` against frameworks that can name activations, and against hand-written models."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc

# The same products under other roundings: programs are compiled apart.
CLOSE = dict(rtol=1e-5, atol=1e-6)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Block(nn.Module):
    """Two dense layers with a norm, as frameworks have them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(6)(x))
        x = nn.LayerNorm()(x)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


X = jnp.asarray(random(4, 5))


def test_linen_agrees_with_its_own_capture():
    model = Block()
    params = model.init(jax.random.key(0), X)
    rules = ["params/.*/(kernel|bias)"]
    logits, found = jax.jit(jc.distill.intermediates(model.apply, rules))(params, X)
    want, state = model.apply(params, X, capture_intermediates=True)
    theirs = {k: v["__call__"][0] for k, v in state["intermediates"].items() if k != "__call__"}
    np.testing.assert_allclose(logits, want, **CLOSE)
    for layer in ("Dense_0", "LayerNorm_0", "Dense_1"):  # each ends with its bias
        np.testing.assert_allclose(found[f"params/{layer}/bias"].output, theirs[layer], **CLOSE)
    np.testing.assert_allclose(found["params/Dense_0/kernel"].input, X)
    np.testing.assert_allclose(found["params/Dense_1/kernel"].input, theirs["LayerNorm_0"], **CLOSE)
    product = theirs["LayerNorm_0"] @ params["params"]["Dense_1"]["kernel"]
    np.testing.assert_allclose(found["params/Dense_1/kernel"].output, product, **CLOSE)


def test_static_arguments_and_random_keys_pass():
    model = Block()
    params = model.init(jax.random.key(0), X)
    rngs = {"dropout": jax.random.key(1)}
    capture = jc.distill.intermediates(model.apply, ["params/Dense_1/kernel"])
    logits, found = capture(params, X, train=True, rngs=rngs)
    np.testing.assert_allclose(logits, model.apply(params, X, train=True, rngs=rngs), **CLOSE)
    dropped = found["params/Dense_1/kernel"].input
    assert 0 < int((dropped == 0).sum()) < dropped.size


def test_nnx():
    model = nnx.Sequential(
        nnx.Linear(5, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 3, rngs=nnx.Rngs(1))
    )
    capture = jc.distill.intermediates(lambda m, x: m(x), ["layers/2/kernel"])
    logits, found = capture(model, X)
    np.testing.assert_allclose(logits, model(X), **CLOSE)
    hidden = jax.nn.relu(model.layers[0](X))
    np.testing.assert_allclose(found["layers/2/kernel"].input, hidden, **CLOSE)


def test_equinox_one_example_and_a_batch():
    model = eqx.nn.MLP(5, 3, 6, 1, key=jax.random.key(0))
    capture = jc.distill.intermediates(lambda m, x: m(x), ["layers/1/weight"])
    _, found = jax.vmap(capture, in_axes=(None, 0))(eqx.filter(model, eqx.is_array) and model, X)
    hidden = jax.vmap(lambda x: jax.nn.relu(model.layers[0](x)))(X)
    np.testing.assert_allclose(found["layers/1/weight"].input, hidden, **CLOSE)
    # With the batch inside, the weight comes first in the product; its axes still go last.
    inside = jc.distill.intermediates(lambda m, x: jax.vmap(m)(x), ["layers/1/weight"])
    _, batched = inside(model, X)
    want = found["layers/1/weight"].output
    assert batched["layers/1/weight"].output.shape == (4, 3)
    np.testing.assert_allclose(batched["layers/1/weight"].output, want, **CLOSE)


LAYERS = {"kernel": jnp.asarray(random(3, 5, 5)), "bias": jnp.asarray(random(3, 5, seed=1))}


def layers_by_hand(params, x):
    inputs, outputs = [], []
    for kernel, bias in zip(params["kernel"], params["bias"]):
        inputs.append(x)
        outputs.append(x @ kernel)
        x = jnp.tanh(x @ kernel + bias)
    return x, jnp.stack(inputs), jnp.stack(outputs)


def stacked(params, x, wrap=lambda f: f):
    step = wrap(lambda x, layer: (jnp.tanh(x @ layer["kernel"] + layer["bias"]), None))
    return jax.lax.scan(step, x, params)[0]


@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(jax.jit(f)))],
    ids=["plain", "jit", "checkpoint", "nested"],
)
def test_scan_stacks_like_the_layers(wrap):
    capture = jc.distill.intermediates(lambda p, x: stacked(p, x, wrap), ["kernel", "bias"])
    out, found = jax.jit(capture)(LAYERS, X)
    want, inputs, outputs = layers_by_hand(LAYERS, X)
    np.testing.assert_allclose(out, want, **CLOSE)
    np.testing.assert_allclose(found["kernel"].input, inputs, **CLOSE)
    np.testing.assert_allclose(found["kernel"].output, outputs, **CLOSE)
    np.testing.assert_allclose(found["bias"].output, outputs + LAYERS["bias"][:, None], **CLOSE)


def test_gradients_are_those_of_the_model_written_out():
    capture = jc.distill.intermediates(lambda p, x: stacked(p, x, jax.checkpoint), ["kernel"])

    def loss(params):
        out, found = capture(params, X)
        return (out**2).sum() + (found["kernel"].output ** 3).sum() + found["kernel"].input.sum()

    def by_hand(params):
        out, inputs, outputs = layers_by_hand(params, X)
        return (out**2).sum() + (outputs**3).sum() + inputs.sum()

    got, want = jax.jit(jax.grad(loss))(LAYERS), jax.jit(jax.grad(by_hand))(LAYERS)
    for k in LAYERS:
        np.testing.assert_allclose(got[k], want[k], rtol=1e-4, atol=1e-4)


def test_a_recurrent_weight_is_seen_at_every_step():
    params = {"w": jnp.asarray(random(5, 5))}
    xs = jnp.asarray(random(7, 5, seed=2))

    def rnn(p, xs):
        step = lambda h, x: (jnp.tanh(h @ p["w"] + x), h)
        return jax.lax.scan(step, jnp.zeros(5), xs)[1]

    states, found = jc.distill.intermediates(rnn, ["w"])(params, xs)
    assert found["w"].output.shape == (7, 5)
    np.testing.assert_allclose(found["w"].input, states, **CLOSE)


def test_uses_are_numbered_and_a_lookup_is_one():
    params = {"embedding": jnp.asarray(random(9, 4)), "w": jnp.asarray(random(4, 4, seed=1))}

    def tied(p, tokens):
        return jnp.tanh(p["embedding"][tokens] @ p["w"]) @ p["embedding"].T

    tokens = jnp.array([[1, 5, 5], [0, 8, 2]])
    logits, found = jc.distill.intermediates(tied, ["embedding"])(params, tokens)
    assert sorted(found) == ["embedding", "embedding[1]"]
    np.testing.assert_array_equal(found["embedding"].output, params["embedding"][tokens])
    np.testing.assert_array_equal(found["embedding[1]"].output, logits)


def test_a_convolution_and_a_scaled_weight():
    params = {"kernel": jnp.asarray(random(3, 3, 2, 4)), "gain": jnp.ones(())}
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x,
        2 * p["kernel"].astype(jnp.float32),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jnp.asarray(random(2, 5, 5, 2))
    out, found = jc.distill.intermediates(conv, ["kernel"])(params, x)
    np.testing.assert_array_equal(found["kernel"].output, out)


def test_a_weight_made_of_two_parameters_has_both_names():
    params = {
        "w": jnp.asarray(random(5, 3)),
        "a": jnp.asarray(random(5, 1)),
        "b": jnp.asarray(random(1, 3)),
    }
    lora = lambda p, x: x @ (p["w"] + p["a"] @ p["b"])
    out, found = jc.distill.intermediates(lora, ["w", "b"])(params, X)
    for name in ("w", "b"):
        np.testing.assert_array_equal(found[name].output, out)


@pytest.mark.parametrize("spec", [jc.quantize.w8a8(), jc.quantize.int4(group_size=3)])
def test_a_student_that_is_being_quantized(spec):
    model = Block()
    params = jc.quantize.prepare_qat(model.init(jax.random.key(0), X), {".*/kernel": spec})
    rules = ["params/Dense_1/(kernel|bias)"]
    capture = jax.jit(jc.distill.intermediates(model.apply, rules))
    logits, found = capture(params, X)
    np.testing.assert_allclose(logits, jc.accelerate(model.apply)(params, X), **CLOSE)
    kernel = found["params/Dense_1/kernel"].output
    np.testing.assert_allclose(kernel + params["params"]["Dense_1"]["bias"], logits, **CLOSE)
    np.testing.assert_allclose(found["params/Dense_1/bias"].output, logits, **CLOSE)
    grads = jax.jit(
        jax.grad(lambda p: (capture(p, X)[1]["params/Dense_1/kernel"].input ** 2).sum())
    )(params)
    assert bool(jnp.any(grads["params"]["Dense_0"]["kernel"].weight != 0))
    integers = jc.quantize.convert(params)
    np.testing.assert_allclose(
        capture(integers, X)[1]["params/Dense_1/kernel"].output, kernel, **CLOSE
    )


def test_custom_derivatives_without_the_weight_stay():
    """A relu whose derivative is its own lie: it is kept."""

    @jax.custom_vjp
    def act(x):
        return jnp.maximum(x, 0)

    act.defvjp(lambda x: (act(x), x), lambda x, g: (7 * g,))
    capture = jc.distill.intermediates(lambda p, x: act(x @ p["w"]) @ p["w"].T, ["w"])
    params = {"w": jnp.eye(5)}
    grad = jax.grad(lambda x: capture(params, x)[0].sum())(X)
    np.testing.assert_array_equal(grad, 7 * np.ones((4, 5)))


@jax.custom_vjp
def opaque(w, x):
    return x @ w


opaque.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


class Counter(nnx.Module):
    def __init__(self):
        self.w, self.n = nnx.Param(jnp.eye(5)), nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.n[...] = self.n[...] + 1
        return x @ self.w[...]


@pytest.mark.parametrize(
    ("fn", "params", "rules", "error", "message"),
    [
        (lambda p, x: x @ p["w"], {"w": jnp.eye(5)}, ["v"], ValueError, "'v' matches none"),
        (
            lambda p, x: x + p["w"].sum() * 0,
            {"w": jnp.eye(5), "u": 0 * X},
            ["u"],
            ValueError,
            "'u' met no",
        ),
        (
            lambda p, x: opaque(p["w"], x),
            {"w": jnp.eye(5)},
            ["w"],
            ValueError,
            "'w' meets data inside custom_vjp",
        ),
        (
            lambda p, x: jax.lax.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ p["w"]), (0, x)
            ),
            {"w": jnp.eye(5)},
            ["w"],
            ValueError,
            "'w' meets data inside while",
        ),
        (
            lambda p, x: jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x, x),
            {"w": jnp.eye(5)},
            ["w"],
            ValueError,
            "'w' meets data inside cond",
        ),
        (lambda m, x: m(x), Counter(), ["w"], TypeError, "updated in place"),
    ],
    ids=["no match", "no data", "custom_vjp", "while", "cond", "in place"],
)
def test_errors_name_the_parameter(fn, params, rules, error, message):
    with pytest.raises(error, match=message):
        jc.distill.intermediates(fn, rules)(params, X)
