"""Trajectory matching: training on the learned images goes where training on the real ones went."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distill.dataset._augment import Augmentation, changed
from jaxcompress.distill.dataset._matching import (
    Learned,
    Method,
    check_images,
    fitted,
    stepped,
    trained,
)

__all__ = ["Rated", "expert", "mtt"]


def expert(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    batches: Iterable[Iterable[tuple[jax.Array, jax.Array]]],
    tx: optax.GradientTransformation,
) -> list[Any]:
    """The parameters of a network before training on real images, and after each epoch.

    Args:
      apply: `apply(params, images)` gives logits.
      params: where the network starts.
      batches: for each epoch its batches, `(images, labels)`; labels are integers.
      tx: its optimizer; the papers take plain SGD.

    Returns:
      A list of trees, one more than there are epochs: what `mtt` is given two of.

    Raises:
      ValueError: no epoch.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> x, y = jnp.eye(2), jnp.array([0, 1])
    >>> path = jc.distill.dataset.expert(
    ...     lambda w, x: x @ w, jnp.zeros((2, 2)), [[(x, y)]] * 3, optax.sgd(1.0)
    ... )
    >>> len(path), path[1].tolist()
    (4, [[0.25, -0.25], [-0.25, 0.25]])

    Cazenavette et al., 2022, arXiv:2203.11932.
    """

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        return trained(tx, apply, params, state, x, y)

    path, state = [params], tx.init(params)
    for epoch in batches:
        for x, y in epoch:
            params, state = step(params, state, x, y)
        path.append(params)
    if len(path) < 2:
        raise ValueError("an expert is trained for one epoch or more")
    return path


class Rated(NamedTuple):
    """The state of `mtt`: the optimizer's, and the learned logarithm of the rate of training.

    >>> import jax.numpy as jnp, optax, jaxcompress as jc
    >>> method = jc.distill.dataset.mtt(lambda w, x: x @ w, optax.sgd(1.0), steps=2, rate=0.5)
    >>> method.init(jnp.zeros((2, 1, 4))).state.log_rate.round(3)
    Array(-0.693, dtype=float32)
    """

    state: Any
    log_rate: jax.Array
    rate_state: Any


def mtt(
    apply: Callable[[Any, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    *,
    steps: int = 10,
    rate: float = 0.02,
    rate_tx: optax.GradientTransformation | None = None,
    batch: int | None = None,
    augmentation: Augmentation | None = None,
) -> Method:
    """Matching training trajectories: a few steps on the set go as far as epochs of the expert.

    `|w_N - w*|^2 / |w_0 - w*|^2`: `w_0` and `w*` are parameters of an expert at two times,
    and `w_N` what `N` steps of gradient descent on the learned images make of `w_0`, at a
    rate that is learned with them.

    Args:
      apply: `apply(params, images)` gives logits.
      tx: an optimizer of the images, `optax.sgd(100.0, momentum=0.5)`.
      steps: `N`. They are unrolled: time to compile and memory grow with them.
      rate: of the descent, where it starts.
      rate_tx: an optimizer of its logarithm; SGD of 1e-2 if None.
      batch: how many of the learned images a step of the descent sees, drawn anew for each;
        all if None, or if there are no more.
      augmentation: of the learned images, drawn anew for each step; none if None.

    Returns:
      A `Method`. Instead of real images its `update` takes `(w_0, w*)`, two of the trees that
      `expert` returns, the second some epochs after the first. If they are equal the loss is
      not finite.

    Raises:
      ValueError: no step, a rate that is not positive, an empty batch.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> d, x, y = jc.distill.dataset, jnp.eye(2), jnp.array([0, 1])
    >>> logits = lambda w, x: x @ w
    >>> start, end = d.expert(logits, jnp.zeros((2, 2)), [[(x, y)] * 9], optax.sgd(1.0))
    >>> method = d.mtt(logits, optax.sgd(1.0), steps=2, rate=1.0)
    >>> learned = method.init(0.5 * x[:, None])
    >>> for key in jax.random.split(jax.random.key(0), 100):
    ...     learned, loss = method.update(key, learned, (start, end))
    >>> bool(loss < 1e-3)
    True

    Cazenavette et al., 2022, Dataset Distillation by Matching Training Trajectories,
    arXiv:2203.11932.
    """
    if steps < 1 or not rate > 0:
        raise ValueError(f"steps is 1 or more and rate positive; got {steps} and {rate}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is 1 or more, or None; got {batch}")
    adapt = optax.sgd(1e-2) if rate_tx is None else rate_tx

    def apart(images: jax.Array, log_rate: jax.Array, key: jax.Array, ends: Any) -> jax.Array:
        start, end = ends
        flat, labels = Learned(images, ()).flat, Learned(images, ()).labels
        params = start
        for i in range(steps):
            x, y, step_key = flat, labels, jax.random.fold_in(key, i)
            if batch is not None and batch < len(flat):
                step_key, draw = jax.random.split(step_key)
                some = jax.random.permutation(draw, len(flat))[:batch]
                x, y = flat[some], labels[some]
            slope = jax.grad(fitted)(params, apply, changed(step_key, x, augmentation), y)
            params = jax.tree.map(lambda w, g: w - jnp.exp(log_rate) * g, params, slope)
        away = lambda a: optax.tree.norm(optax.tree.sub(a, end), squared=True)
        return away(params) / away(start)

    @jax.jit
    def step(key: jax.Array, learned: Learned, ends: Any) -> tuple[Learned, jax.Array]:
        images, held = learned.images, learned.state
        value, (slope, rate_slope) = jax.value_and_grad(apart, (0, 1))(
            images, held.log_rate, key, ends
        )
        moved = stepped(tx, images, held.state, slope)
        rate_updates, rate_state = adapt.update(rate_slope, held.rate_state, held.log_rate)
        log_rate = optax.apply_updates(held.log_rate, rate_updates)
        return Learned(moved.images, Rated(moved.state, log_rate, rate_state)), value

    def init(images: jax.Array) -> Learned:
        check_images(images)
        log_rate = jnp.log(jnp.float32(rate))
        return Learned(images, Rated(tx.init(images), log_rate, adapt.init(log_rate)))

    def update(key: jax.Array, learned: Learned, real: Any) -> tuple[Learned, jax.Array]:
        start, end = real
        of = [str(jax.tree.map(jnp.shape, tree)) for tree in (start, end)]
        if of[0] != of[1]:
            raise ValueError(
                "mtt takes the parameters of an expert at two times, of one structure "
                f"and of the same shapes; got {of[0]} and {of[1]}"
            )
        return step(key, learned, (start, end))

    return Method(init, update)
