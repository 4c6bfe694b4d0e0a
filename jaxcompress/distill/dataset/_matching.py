"""What is learned and how: a set, a method, and distribution matching, the plainest of them."""

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
    "dm",
    "fitted",
    "method_of",
    "seen",
    "stepped",
    "trained",
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


def fitted(
    params: Any, apply: Callable[[Any, jax.Array], jax.Array], x: jax.Array, y: jax.Array
) -> jax.Array:
    """The mean cross-entropy that networks are trained with."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def trained(
    tx: optax.GradientTransformation,
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    state: Any,
    x: jax.Array,
    y: jax.Array,
) -> tuple[Any, Any]:
    """A network, and its optimizer's state, after a step of training."""
    updates, state = tx.update(jax.grad(fitted)(params, apply, x, y), state, params)
    return optax.apply_updates(params, updates), state


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
