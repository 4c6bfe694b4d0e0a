"""The real MNIST or Fashion-MNIST, from the four files of either in a folder."""

import gzip
from pathlib import Path

import numpy as np

from _data import Dataset, Split
from _harness import fail

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte") + (
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it


def mnist(folder: Path, validation: int = 5000) -> Dataset:
    """60,000 images to train and choose on, the last `validation` of them, and 10,000 to test."""
    x, y, test_x, test_y = (_read(folder, name) for name in _FILES)
    flat = lambda images: (images.reshape(len(images), -1) / 255).astype(np.float32)
    x, test_x = flat(x), flat(test_x)
    y, test_y = y.astype(np.int32), test_y.astype(np.int32)
    cut = len(x) - validation
    return Dataset(Split(x[:cut], y[:cut]), Split(x[cut:], y[cut:]), Split(test_x, test_y))


def fashion(folder: Path | None = None) -> Dataset:
    """Fashion-MNIST in full (Xiao et al., 2017), from a folder or Debian's package."""
    folder = folder or FASHION
    if not (folder / f"{_FILES[0]}.gz").exists():
        fail(
            f"Fashion-MNIST is not in {folder}. It comes with Debian's package: apt-get install "
            "dataset-fashion-mnist"
        )
    return mnist(folder)


def _read(folder: Path, name: str) -> np.ndarray:
    """An array from an idx file, compressed or not."""
    for file, opener in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if file.exists():
            with opener(file, "rb") as stream:
                data = stream.read()
            break
    else:
        fail(f"{folder} has neither {name} nor {name}.gz")
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        fail(f"{file} is no idx file of bytes")
    ndim = data[3]
    shape = np.frombuffer(data, ">i4", ndim, 4)
    if len(data) != 4 + 4 * ndim + int(np.prod(shape)):
        fail(f"{file} is truncated")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
