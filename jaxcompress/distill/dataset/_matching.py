"""Learned data sets: images that make a network feel, or move, as the real ones do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distill.dataset._augment import Augmentation, changed

__all__ = [
    "Learned",
    "Method",
    "check_images",
    "check_real",
    "dc",
    "dm",
    "method_of",
    "seen",
    "stepped",
]


class Learned(NamedTuple):
    """A data set that is being learned: `[classes, per class, ...]`, and its optimizer's state.

    Class `c` is `images[c]`; `labels` names them in the flat order.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.distill.dataset.Learned(jnp.zeros((3, 2, 4)), ()).labels
    Array([0, 0, 1, 1, 2, 2], dtype=int32)
    """

    images: jax.Array
    state: Any

    @property
    def labels(self) -> jax.Array:
        """The class of each image, `[classes * per class]`."""
        classes, per_class = self.images.shape[:2]
        return jnp.repeat(jnp.arange(classes, dtype=jnp.int32), per_class)

    @property
    def flat(self) -> jax.Array:
        """The images, `[classes * per class, ...]`."""
        return self.images.reshape(-1, *self.images.shape[2:])


class Method(NamedTuple):
    """A pure `init(images)` and `update(key, learned, real)`, as an optimizer has, compiled.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> d = jc.distill.dataset
    >>> net = lambda key: {"w": jax.random.normal(key, (4, 8))}
    >>> method = d.dm(net, lambda p, x: jnp.tanh(x @ p["w"]), optax.sgd(1.0))
    >>> learned = method.init(jnp.zeros((3, 2, 4)))
    >>> learned, loss = method.update(jax.random.key(0), learned, jnp.ones((3, 16, 4)))
    >>> bool(jnp.any(learned.images != 0))
    True
    """

    init: Callable[[jax.Array], Learned]
    update: Callable[[jax.Array, Learned, Any], tuple[Learned, jax.Array]]


def dm(
    init: Callable[[jax.Array], Any],
    features: Callable[[Any, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    *,
    augmentation: Augmentation | None = None,
) -> Method:
    """Distribution matching: means of features under random networks.

    `sum_c |mean_i f(x_ci) - mean_j f(s_cj)|^2`, `x` the real and `s` the learned images of
    class `c`, `f` a network that is drawn anew for each update and never trained.

    Args:
      init: `init(key)` draws the parameters of a network.
      features: `features(params, images)` is `[n, ...]`, without the last layer.
      tx: an optimizer of the images, `optax.sgd(1.0)`.
      augmentation: of real and learned images alike; none if None.

    Returns:
      A `Method`. `real` in its `update` is `[classes, batch, ...]`, drawn anew each time.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> net = lambda key: jax.random.normal(key, (4, 8))
    >>> method = jc.distill.dataset.dm(net, lambda w, x: x @ w, optax.sgd(0.01))
    >>> learned, real = method.init(jnp.zeros((1, 1, 4))), jnp.ones((1, 5, 4))
    >>> for key in jax.random.split(jax.random.key(0), 200):
    ...     learned, loss = method.update(key, learned, real)
    >>> learned.images.round(2)
    Array([[[1., 1., 1., 1.]]], dtype=float32)

    Zhao and Bilen, 2023, Dataset Condensation with Distribution Matching, arXiv:2110.04181.
    """

    def distance(key: jax.Array, images: jax.Array, real: jax.Array) -> jax.Array:
        net_key, augment_key = jax.random.split(key)
        params = init(net_key)

        def means(x: jax.Array, key: jax.Array) -> jax.Array:
            found = features(params, seen(key, x, augmentation))
            return jnp.mean(found.reshape(*x.shape[:2], -1), 1)

        # One key for both: what happens to the real happens to the learned.
        gap = means(images, augment_key) - jax.lax.stop_gradient(means(real, augment_key))
        return jnp.sum(gap**2)

    return method_of(jax.jit(jax.value_and_grad(distance, 1)), tx)


def dc(
    init: Callable[[jax.Array], Any],
    apply: Callable[[Any, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    *,
    augmentation: Augmentation | None = None,
) -> Method:
    """Gradient matching: one step on the learned images goes where one on the real ones does.

    `sum_c sum_l sum_o (1 - cos(g_lo(x_c), g_lo(s_c)))`: `g` is the gradient of the
    cross-entropy to layer `l`, one vector for each output `o` (the last axis of a weight);
    networks are drawn anew for each update. With an augmentation this is DSA. The papers
    train each network on between updates; with one image a class they do not, and nor does
    this.

    Args:
      init: `init(key)` draws the parameters of a network.
      apply: `apply(params, images)` gives logits.
      tx: an optimizer of the images, `optax.sgd(0.1)`.
      augmentation: of real and learned images alike; none if None.

    Returns:
      A `Method`. `real` in its `update` is `[classes, batch, ...]`, drawn anew each time.

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

    def slope(key: jax.Array, images: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        net_key, augment_key = jax.random.split(key)
        params = draw(net_key)
        # A class is a call: a convolution within a scan is many times slower on CPUs.
        found = [
            one(ours, theirs, params, jnp.int32(label), jax.random.fold_in(augment_key, label))
            for label, (ours, theirs) in enumerate(zip(images, real))
        ]
        losses, slopes = zip(*found)
        return jnp.sum(jnp.stack(losses)), jnp.stack(slopes)

    return method_of(slope, tx)


def _apart(a: jax.Array, b: jax.Array) -> jax.Array:
    """`sum_o (1 - cos)` over the outputs of a weight; biases and scales have no part."""
    if a.ndim < 2:
        return jnp.zeros(())
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    product = jnp.sum(a * b, 0)
    square = jnp.sum(a**2, 0) * jnp.sum(b**2, 0)
    there = square > 0
    return jnp.sum(jnp.where(there, 1 - product / jnp.sqrt(jnp.where(there, square, 1.0)), 0.0))


def method_of(
    slope: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    tx: optax.GradientTransformation,
) -> Method:
    """From a loss and its gradient to the learned images."""

    def start(images: jax.Array) -> Learned:
        check_images(images)
        return Learned(images, tx.init(images))

    move = jax.jit(lambda learned, gradient: stepped(tx, learned.images, learned.state, gradient))

    def update(key: jax.Array, learned: Learned, real: jax.Array) -> tuple[Learned, jax.Array]:
        check_real(learned.images, real)
        loss, gradient = slope(key, learned.images, real)
        return move(learned, gradient), loss

    return Method(start, update)


def stepped(
    tx: optax.GradientTransformation, images: jax.Array, state: Any, gradient: jax.Array
) -> Learned:
    """The images after a step of their optimizer."""
    updates, state = tx.update(gradient, state, images)
    return Learned(optax.apply_updates(images, updates), state)


def seen(key: jax.Array, images: jax.Array, how: Augmentation | None) -> jax.Array:
    """Images without the axis of classes; with one key what happens to one happens to all."""
    return changed(key, images.reshape(-1, *images.shape[2:]), how)


def check_images(images: jax.Array) -> None:
    """Raises unless there are axes for the classes and for the images of a class."""
    if images.ndim < 3:
        raise ValueError(f"images must be [classes, per class, ...]; got {images.shape}")


def check_real(images: jax.Array, real: jax.Array) -> None:
    """Raises unless real images are as many classes, and each as large, as the learned ones."""
    if real.shape[:1] + real.shape[2:] != images.shape[:1] + images.shape[2:]:
        raise ValueError(
            f"real images must be [classes, batch, ...] like the learned, which are "
            f"{images.shape}; got {real.shape}"
        )
