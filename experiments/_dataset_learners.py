"""The methods of distill_dataset.py with their settings, and the experts that MTT follows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from _dataset_models import Network

d = jc.distill.dataset
EXPERTS, AHEAD = 3, 2  # networks, and how many epochs MTT looks ahead
IMAGES, BATCH = 10_000, 256  # of an epoch
FEATURES = 288  # of the ConvNet that sets are learned with


def many(per_class: int) -> bool:
    """More images than features: methods that fit or follow something need it to be firmer."""
    return 10 * per_class > FEATURES


def updates(per_class: int) -> int:
    """Of a set: one takes the longer the larger the set, and a night is what there is."""
    return 1000 if per_class == 1 else 300 if per_class <= 10 else 100


def method(name: str, network: Network, per_class: int) -> Any:
    """`name` with a rate near the one of its paper; a flip makes other shoes of shoes.

    The images of a class share a slope, so rates of SGD grow with their number; DC's cosines,
    steep from the start, let it grow from ten on only, and MTT's batch no longer. FRePo's
    regression on fewer features than images fits their noise, but for a large ridge. DC's networks
    are not trained in between: in so few updates it gives no more.
    """
    ridge = 0.1 if many(per_class) else 1e-6
    steep = 0.1 * max(1, per_class / 10)
    sgd = lambda rate: optax.sgd(rate, momentum=0.5)
    how = d.Augmentation(flip=False)
    init, features, apply = network
    return {
        "dm": lambda: d.dm(init, features, sgd(1.0 * per_class), augmentation=how),
        "dc": lambda: d.dc(init, apply, sgd(steep)),
        "dsa": lambda: d.dc(init, apply, sgd(steep), augmentation=how),
        "kip": lambda: d.kip(d.relu_ntk(2), optax.adam(3e-3), ridge=0.1, augmentation=how),
        "frepo": lambda: d.frepo(
            jax.random.key(4),
            init,
            features,
            apply,
            optax.adam(1e-2),
            ridge=ridge,
            augmentation=how,
        ),
        "mtt": lambda: d.mtt(
            apply,
            sgd(50.0 if many(per_class) else 10.0 * per_class),
            steps=8,
            rate=0.03 if many(per_class) else 0.1,
            batch=30,
            augmentation=how,
        ),
    }[name]()


class Experts(NamedTuple):
    """Networks at the start and after each epoch of ordinary training."""

    paths: list[list[Any]]

    def pair(self, random: np.random.Generator) -> tuple[Any, Any]:
        """One of them at two times."""
        path = self.paths[random.integers(len(self.paths))]
        start = random.integers(len(path) - AHEAD)
        return path[start], path[start + AHEAD]


def experts(network: Network, x: np.ndarray, y: np.ndarray, per_class: int, quick: bool) -> Experts:
    """A few networks, each trained on images of its own.

    They go on until they know more than a random set of that size teaches, else to follow them
    is to unlearn: on held-out images 77 % after five epochs, where there are many images 84 after
    ten; ten random ones a class teach 75 and fifty 81.
    """
    epochs, rate = (12, 0.05) if many(per_class) else (6, 0.02)

    def path(seed: int) -> list[Any]:
        random = np.random.default_rng(seed)

        def epoch() -> Any:
            rows = random.choice(len(x), BATCH if quick else IMAGES, replace=False)
            for i in range(0, len(rows) // BATCH * BATCH, BATCH):
                chosen = rows[i : i + BATCH]
                yield jnp.asarray(x[chosen]), jnp.asarray(y[chosen], jnp.int32)

        params = network.init(jax.random.key(seed))
        return d.expert(network.apply, params, (epoch() for _ in range(epochs)), optax.sgd(rate))

    return Experts([path(seed) for seed in range(1 if quick else EXPERTS)])
