"""Learned data sets by kernel ridge regression: trained on them, it knows the real images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distill.dataset._augment import Augmentation
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

__all__ = ["frepo", "kip", "relu_ntk"]

Kernel = Callable[[jax.Array, jax.Array], jax.Array]


def relu_ntk(depth: int) -> Kernel:
    """The neural tangent kernel of a wide ReLU network of `depth` hidden layers, no biases.

    `S_0 = T_0 = x y^T / d`; with `c` the cosine `S_l / sqrt(S_l(x, x) S_l(y, y))` and
    `a = arccos c`, layer by layer `S <- sqrt(..) (sqrt(1 - c^2) + (pi - a) c) / pi` and
    `T <- S + T (pi - a) / pi`.

    Args:
      depth: hidden layers, 0 or more; weights have a variance of 2 over their inputs.

    Returns:
      `kernel(x, y)`, `[n, m]` for `x[n, ...]` and `y[m, ...]`; images are flattened.

    Raises:
      ValueError: a negative depth.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> x = jnp.array([[2.0, 0.0], [0.0, 2.0]])
    >>> jc.distill.dataset.relu_ntk(1)(x, x).round(3)       # 2 / pi off the diagonal
    Array([[4.   , 0.637],
           [0.637, 4.   ]], dtype=float32)

    Jacot, Gabriel and Hongler, 2018, Neural Tangent Kernel, arXiv:1806.07572; Cho and Saul,
    2009, Kernel Methods for Deep Learning.
    """
    if depth < 0:
        raise ValueError(f"a network has 0 hidden layers or more; got {depth}")

    def kernel(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = (a.reshape(len(a), -1) for a in (x, y))
        # The diagonals stay what they are: half of the signal survives, times a variance of 2.
        own = lambda a: jnp.sum(a**2, -1) / a.shape[-1]
        square = own(x)[:, None] * own(y)[None]
        # A root has no slope at zero, where an image is blank.
        size = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        s = x @ y.T / x.shape[-1]
        t = s
        for _ in range(depth):
            c = s / jnp.maximum(size, 1e-12)
            # An arccos has no slope at one, where each image meets itself.
            ends = jnp.abs(c) > 1 - 1e-6
            inside = jnp.where(ends, 0.0, c)
            rest = jnp.where(ends, c > 0, 1 - jnp.arccos(inside) / jnp.pi)
            root = jnp.where(ends, 0.0, jnp.sqrt(1 - inside**2))
            s = size * (root / jnp.pi + rest * jnp.clip(c, -1.0, 1.0))
            t = s + t * rest
        return t

    return kernel


def kip(
    kernel: Kernel,
    tx: optax.GradientTransformation,
    *,
    ridge: float = 1e-6,
    augmentation: Augmentation | None = None,
) -> Method:
    """Kernel inducing points: ridge regression from the learned images predicts the real ones.

    `mean |y_r - K_rs (K_ss + ridge tr(K_ss) / n I)^-1 y_s|^2`, summed over classes: `s` the
    learned, `r` the real images, `y` their classes, one-hot less their mean.

    Args:
      kernel: `kernel(x, y)` is `[n, m]`; `relu_ntk(2)`, say.
      tx: an optimizer of the images, `optax.adam(1e-2)`.
      ridge: of the regression, relative to the mean of the kernel's diagonal.
      augmentation: of real and learned images alike; none if None. Without one the images
        may suit the kernel alone, and teach other networks less from update to update.

    Returns:
      A `Method`. `real` in its `update` is `[classes, batch, ...]`, drawn anew each time.

    Raises:
      ValueError: a ridge that is not positive.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> d = jc.distill.dataset
    >>> method = d.kip(d.relu_ntk(1), optax.adam(0.1))
    >>> real = jnp.stack([jnp.ones((5, 4)), -jnp.ones((5, 4))])
    >>> learned = method.init(jax.random.normal(jax.random.key(0), (2, 1, 4)))
    >>> losses = []
    >>> for key in jax.random.split(jax.random.key(1), 60):
    ...     learned, loss = method.update(key, learned, real)
    ...     losses.append(float(loss))
    >>> losses[-1] < 0.1 * losses[0]
    True

    Nguyen, Chen and Lee, 2021, Dataset Meta-Learning from Kernel Ridge-Regression,
    arXiv:2011.00050.
    """
    _check_ridge(ridge)

    def loss(key: jax.Array, images: jax.Array, real: jax.Array) -> jax.Array:
        ours, theirs = (seen(key, x, augmentation) for x in (images, real))
        return _regression(kernel(ours, ours), kernel(theirs, ours), images, real, ridge)

    return method_of(jax.jit(jax.value_and_grad(loss, 1)), tx)


class Pool(NamedTuple):
    """The state of `frepo`: the optimizer's, and networks in training, stacked.

    >>> import jax, optax, jaxcompress as jc
    >>> draw = lambda key: jax.random.normal(key, (4, 2))
    >>> fn = lambda w, x: x @ w
    >>> method = jc.distill.dataset.frepo(jax.random.key(0), draw, fn, fn, optax.sgd(0.1), pool=3)
    >>> method.init(jax.numpy.zeros((2, 1, 4))).state.params.shape
    (3, 4, 2)
    """

    state: Any
    params: Any
    net_state: Any
    age: jax.Array  # [networks], int32: the steps that each was trained


def frepo(
    key: jax.Array,
    init: Callable[[jax.Array], Any],
    features: Callable[[Any, jax.Array], jax.Array],
    apply: Callable[[Any, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    *,
    net_tx: optax.GradientTransformation | None = None,
    pool: int = 10,
    age: int = 100,
    ridge: float = 1e-6,
    augmentation: Augmentation | None = None,
) -> Method:
    """Feature regression with a pool: as `kip`, on features of networks that train on the set.

    The kernel is `f(x) f(y)^T` of one network of a pool. It is drawn for each update, then
    makes one step of training on the learned images, and after `age` steps begins anew.

    Args:
      key: draws the first networks.
      init: `init(key)` draws the parameters of a network.
      features: `features(params, images)` is `[n, ...]`, without the last layer.
      apply: `apply(params, images)` gives logits.
      tx: an optimizer of the images, `optax.adam(1e-3)`.
      net_tx: an optimizer of the networks; Adam of 3e-4 if None.
      pool: how many networks.
      age: the steps that each is trained.
      ridge: as in `kip`. With more images than features the kernel has no inverse, and in
        float32 1e-6 is too little: the loss is not a number then. 1e-3 mends that, but
        still fits the noise of the features, so that images get worse; 0.1 teaches.
      augmentation: of real and learned images alike; none if None.

    Returns:
      A `Method`. `real` in its `update` is `[classes, batch, ...]`, drawn anew each time.

    Raises:
      ValueError: a ridge that is not positive; no network; no age.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> net = lambda key: {"w": jax.random.normal(key, (4, 8)), "v": jnp.zeros((8, 2))}
    >>> features = lambda p, x: jax.nn.relu(x @ p["w"])
    >>> logits = lambda p, x: features(p, x) @ p["v"]
    >>> method = jc.distill.dataset.frepo(
    ...     jax.random.key(0), net, features, logits, optax.adam(0.1), pool=2
    ... )
    >>> real = jnp.stack([jnp.ones((5, 4)), -jnp.ones((5, 4))])
    >>> learned = method.init(jax.random.normal(jax.random.key(1), (2, 1, 4)))
    >>> learned, loss = method.update(jax.random.key(2), learned, real)
    >>> int(learned.state.age.sum())
    1

    Zhou, Nezhadarya and Ba, 2022, Dataset Distillation using Neural Feature Regression,
    arXiv:2206.00719.
    """
    _check_ridge(ridge)
    if min(pool, age) < 1:
        raise ValueError(f"pool and age are 1 or more; got {pool} and {age}")
    trained_by = optax.adam(3e-4) if net_tx is None else net_tx

    def start(images: jax.Array) -> Learned:
        check_images(images)
        params = jax.vmap(init)(jax.random.split(key, pool))
        net_state = jax.vmap(trained_by.init)(params)
        return Learned(images, Pool(tx.init(images), params, net_state, jnp.zeros(pool, jnp.int32)))

    @jax.jit
    def step(key: jax.Array, learned: Learned, real: jax.Array) -> tuple[Learned, jax.Array]:
        pick_key, augment_key, init_key = jax.random.split(key, 3)
        held: Pool = learned.state
        i = jax.random.randint(pick_key, (), 0, pool)
        params, net_state = jax.tree.map(lambda leaf: leaf[i], (held.params, held.net_state))

        shown = lambda x: seen(augment_key, x, augmentation)

        def loss(images: jax.Array) -> jax.Array:
            f = lambda x: features(params, shown(x)).reshape(x.shape[0] * x.shape[1], -1)
            ours, theirs = f(images), jax.lax.stop_gradient(f(real))
            return _regression(ours @ ours.T, theirs @ ours.T, images, real, ridge)

        value, gradient = jax.value_and_grad(loss)(learned.images)
        moved = stepped(tx, learned.images, held.state, gradient)

        params, net_state = trained(
            trained_by, apply, params, net_state, shown(moved.images), moved.labels
        )
        old = held.age[i] + 1 >= age
        fresh = init(init_key)
        params, net_state = jax.tree.map(
            lambda new, now: jnp.where(old, new, now),
            (fresh, trained_by.init(fresh)),
            (params, net_state),
        )
        put = lambda whole, part: whole.at[i].set(part)
        params = jax.tree.map(put, held.params, params)
        net_state = jax.tree.map(put, held.net_state, net_state)
        ages = held.age.at[i].set(jnp.where(old, 0, held.age[i] + 1))
        return Learned(moved.images, Pool(moved.state, params, net_state, ages)), value

    def update(key: jax.Array, learned: Learned, real: jax.Array) -> tuple[Learned, jax.Array]:
        check_real(learned.images, real)
        return step(key, learned, real)

    return Method(start, update)


def _check_ridge(ridge: float) -> None:
    if not ridge > 0:
        raise ValueError(f"ridge is positive; got {ridge}")


def _regression(
    ours: jax.Array, cross: jax.Array, images: jax.Array, real: jax.Array, ridge: float
) -> jax.Array:
    """The squared error of the real images' classes; `ours[n, n]` and `cross[m, n]` are kernels."""
    classes = len(images)
    eye = jnp.eye(classes) - 1 / classes
    of = lambda x: jnp.repeat(eye, x.shape[1], 0)
    mean = jnp.trace(ours) / len(ours)
    mean = jnp.where(mean > 0, mean, 1.0)  # of blank images alone
    damped = ours + ridge * mean * jnp.eye(len(ours))
    weights = jax.scipy.linalg.solve(damped, of(images), assume_a="pos")
    return jnp.mean(jnp.sum((of(real) - cross @ weights) ** 2, -1))
