"""Gradient matching: a step on the learned images goes where one on the real ones does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distill.dataset._augment import Augmentation, changed
from jaxcompress.distill.dataset._matching import (
    Learned,
    Method,
    check_images,
    check_real,
    method_of,
    seen,
    stepped,
    trained,
)

__all__ = ["Trained", "dc"]


class Trained(NamedTuple):
    """The state of `dc` with `net_steps`: the optimizer's, and a network in training.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> draw = lambda key: jax.random.normal(key, (4, 2))
    >>> method = jc.distill.dataset.dc(draw, lambda w, x: x @ w, optax.sgd(0.1), net_steps=3)
    >>> method.init(jnp.zeros((2, 1, 4))).state.age         # 0: the next update draws one
    Array(0, dtype=int32)
    """

    state: Any
    params: Any
    net_state: Any
    age: jax.Array  # int32: the updates that it has seen


def dc(
    init: Callable[[jax.Array], Any],
    apply: Callable[[Any, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    *,
    net_steps: int = 0,
    net_tx: optax.GradientTransformation | None = None,
    age: int = 10,
    augmentation: Augmentation | None = None,
) -> Method:
    """Gradient matching: one step on the learned images goes where one on the real ones does.

    `sum_c sum_l sum_o (1 - cos(g_lo(x_c), g_lo(s_c)))`: `g` is the gradient of the
    cross-entropy to layer `l`, one vector for each output `o` (the last axis of a weight).
    A network is drawn anew for each update; with `net_steps` it is trained on the learned
    images after an update and drawn anew after `age` of them, so that the images also teach
    what a network does not know at its start. With an augmentation this is DSA.

    Args:
      init: `init(key)` draws the parameters of a network.
      apply: `apply(params, images)` gives logits.
      tx: an optimizer of the images, `optax.sgd(0.1)`.
      net_steps: of training, each on all the learned images, after an update; the papers
        take none for one image a class, 50 for ten and 10 for fifty.
      net_tx: an optimizer of the network; SGD of 1e-2 with momentum 0.5 if None.
      age: updates that a network serves if it is trained.
      augmentation: of real and learned images alike; none if None.

    Returns:
      A `Method`. `real` in its `update` is `[classes, batch, ...]`, drawn anew each time.

    Raises:
      ValueError: a negative number of steps; no age.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> net = lambda key: {"w": jax.random.normal(key, (4, 2))}
    >>> method = jc.distill.dataset.dc(net, lambda p, x: x @ p["w"], optax.sgd(0.1))
    >>> real = jnp.stack([jnp.ones((5, 4)), -jnp.ones((5, 4))])
    >>> learned, loss = method.update(jax.random.key(0), method.init(real[:, :1]), real)
    >>> bool(loss < 1e-5)  # it starts from the real ones
    True

    Zhao, Mopuri and Bilen, 2021, Dataset Condensation with Gradient Matching,
    arXiv:2006.05929; with augmentation arXiv:2102.08259.
    """
    if net_steps < 0 or age < 1:
        raise ValueError(f"net_steps is 0 or more, age 1 or more; got {net_steps} and {age}")
    trained_by = optax.sgd(1e-2, momentum=0.5) if net_tx is None else net_tx

    def distance(
        ours: jax.Array, theirs: jax.Array, params: Any, label: jax.Array, key: jax.Array
    ) -> jax.Array:
        def gradient(x: jax.Array) -> Any:
            x = changed(key, x, augmentation)

            def loss(params: Any) -> jax.Array:
                log_p = jax.nn.log_softmax(apply(params, x))
                return -jnp.mean(log_p[:, label])

            return jax.grad(loss)(params)

        target = jax.lax.stop_gradient(gradient(theirs))
        parts = jax.tree.map(_apart, gradient(ours), target)
        return sum(jax.tree.leaves(parts), jnp.zeros(()))

    one = jax.jit(jax.value_and_grad(distance))
    draw = jax.jit(init)

    def slope(
        params: Any, key: jax.Array, images: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # A class is a call: a convolution within a scan is many times slower on CPUs.
        found = [
            one(ours, theirs, params, jnp.int32(label), jax.random.fold_in(key, label))
            for label, (ours, theirs) in enumerate(zip(images, real))
        ]
        losses, slopes = zip(*found)
        return jnp.sum(jnp.stack(losses)), jnp.stack(slopes)

    def slope_of_a_drawn(
        key: jax.Array, images: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        net_key, augment_key = jax.random.split(key)
        return slope(draw(net_key), augment_key, images, real)

    if net_steps == 0:
        return method_of(slope_of_a_drawn, tx)

    def start(images: jax.Array) -> Learned:
        check_images(images)
        blank = optax.tree.zeros_like(jax.eval_shape(init, jax.random.key(0)))
        held = Trained(tx.init(images), blank, trained_by.init(blank), jnp.int32(0))
        return Learned(images, held)

    @jax.jit
    def network(key: jax.Array, held: Trained) -> tuple[Any, Any]:
        """The one in training, or a new one."""
        new = init(key)
        pick = lambda new, old: jnp.where(held.age == 0, new, old)
        return jax.tree.map(pick, (new, trained_by.init(new)), (held.params, held.net_state))

    @jax.jit
    def train(key: jax.Array, params: Any, net_state: Any, learned: Learned) -> tuple[Any, Any]:
        x = seen(key, learned.images, augmentation)
        return trained(trained_by, apply, params, net_state, x, learned.labels)

    def update(key: jax.Array, learned: Learned, real: jax.Array) -> tuple[Learned, jax.Array]:
        check_real(learned.images, real)
        net_key, augment_key, train_key = jax.random.split(key, 3)
        held: Trained = learned.state
        params, net_state = network(net_key, held)
        loss, gradient = slope(params, augment_key, learned.images, real)
        moved = stepped(tx, learned.images, held.state, gradient)
        # A step is a call, as a class is.
        for i in range(net_steps):
            params, net_state = train(jax.random.fold_in(train_key, i), params, net_state, moved)
        state = Trained(moved.state, params, net_state, (held.age + 1) % age)
        return Learned(moved.images, state), loss

    return Method(start, update)


def _apart(a: jax.Array, b: jax.Array) -> jax.Array:
    """`sum_o (1 - cos)` over the outputs of a weight; biases and scales have no part."""
    if a.ndim < 2:
        return jnp.zeros(())
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    product = jnp.sum(a * b, 0)
    square = jnp.sum(a**2, 0) * jnp.sum(b**2, 0)
    there = square > 0
    return jnp.sum(jnp.where(there, 1 - product / jnp.sqrt(jnp.where(there, square, 1.0)), 0.0))
