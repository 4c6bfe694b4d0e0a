"""Baselines of data distillation: choose real examples instead of learning new ones."""

from collections.abc import Callable

import jax
import numpy as np

__all__ = ["herding", "k_centre", "random"]


def random(labels: np.ndarray | jax.Array, per_class: int, *, seed: int) -> np.ndarray:
    """Chooses `per_class` examples of each class at random.

    Args:
      labels: integers, `[examples]`.
      per_class: how many.
      seed: of the choice.

    Returns:
      Indices `[classes * per_class]`, class by class.

    Raises:
      ValueError: a class has fewer.

    >>> import numpy as np, jaxcompress as jc
    >>> labels = np.array([0, 1, 1, 0, 0, 1])
    >>> chosen = jc.distill.dataset.random(labels, 2, seed=0)
    >>> labels[chosen]
    array([0, 0, 1, 1])
    """
    rng = np.random.default_rng(seed)
    return _each_class(labels, per_class, lambda mine: rng.permutation(len(mine))[:per_class])


def herding(
    features: np.ndarray | jax.Array, labels: np.ndarray | jax.Array, per_class: int
) -> np.ndarray:
    """Chooses examples whose running mean stays nearest to the mean of their class.

    `i_k = argmin_i |mean - (sum_{j < k} f_j + f_i) / k|`, each example once.

    Args:
      features: `[examples, ...]`: the images, or what a network makes of them.
      labels, per_class: as for `random`.

    Returns:
      Indices, as `random`; in each class in the order of choice.

    Raises:
      ValueError: a class has fewer, or there are not as many features as labels.

    >>> import numpy as np, jaxcompress as jc
    >>> features = np.array([[0.0], [1.0], [2.0], [9.0]])
    >>> jc.distill.dataset.herding(features, np.zeros(4, int), 2)  # the mean is 3
    array([2, 1])

    Welling, 2009, Herding Dynamical Weights to Learn, ICML; Rebuffi et al., 2017, iCaRL,
    arXiv:1611.07725.
    """
    rows = _rows(features, labels)

    def choose(mine: np.ndarray) -> np.ndarray:
        f, total = rows[mine], np.zeros(rows.shape[1])
        mean, free, chosen = f.mean(0), np.ones(len(f), bool), []
        for k in range(1, per_class + 1):
            distance = np.sum((mean - (total + f) / k) ** 2, 1)
            i = int(np.argmin(np.where(free, distance, np.inf)))
            free[i] = False
            total += f[i]
            chosen.append(i)
        return np.array(chosen)

    return _each_class(labels, per_class, choose)


def k_centre(
    features: np.ndarray | jax.Array, labels: np.ndarray | jax.Array, per_class: int
) -> np.ndarray:
    """Chooses examples so that no other of their class is far from all of them.

    The first is nearest to the mean of its class; each next is the one farthest from those
    chosen: at most twice as far as the best choice leaves anything.

    Args:
      features, labels, per_class: as for `herding`.

    Returns:
      Indices, as `herding`.

    Raises:
      ValueError: as `herding`.

    >>> import numpy as np, jaxcompress as jc
    >>> features = np.array([[0.0], [1.0], [2.0], [9.0]])
    >>> jc.distill.dataset.k_centre(features, np.zeros(4, int), 2)
    array([2, 3])

    Gonzalez, 1985, Clustering to Minimize the Maximum Intercluster Distance; Sener and
    Savarese, 2018, arXiv:1708.00489.
    """
    rows = _rows(features, labels)

    def choose(mine: np.ndarray) -> np.ndarray:
        f = rows[mine]
        chosen = [int(np.argmin(np.sum((f - f.mean(0)) ** 2, 1)))]
        nearest = np.full(len(f), np.inf)
        for _ in range(per_class - 1):
            nearest = np.minimum(nearest, np.sum((f - f[chosen[-1]]) ** 2, 1))
            nearest[chosen] = -1.0
            chosen.append(int(np.argmax(nearest)))
        return np.array(chosen)

    return _each_class(labels, per_class, choose)


def _rows(features: np.ndarray | jax.Array, labels: np.ndarray | jax.Array) -> np.ndarray:
    rows = np.asarray(features, np.float64).reshape(len(features), -1)
    if len(rows) != len(labels):
        raise ValueError(f"there are {len(rows)} features and {len(labels)} labels")
    return rows


def _each_class(
    labels: np.ndarray | jax.Array, per_class: int, choose: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """`choose` in each class, as indices of all examples."""
    labels = np.asarray(labels)
    chosen = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        if not 1 <= per_class <= len(mine):
            raise ValueError(
                f"per_class must be from 1 to the {len(mine)} examples of class {label}; got "
                f"{per_class}"
            )
        chosen.append(mine[choose(mine)])
    return np.concatenate(chosen)
