"""The loader of Fashion-MNIST, and the parts that an interrupted run goes on from."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

import qat_fashion
from _data import fashion


def write(folder, name, images, labels):
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz", "wb") as file:
        file.write(b"\0" * 16 + images.tobytes())
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"\0" * 8 + labels.tobytes())


def test_the_files_as_they_are_published(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 28, 28)).astype(np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    write(tmp_path, "train", images, labels)
    write(tmp_path, "t10k", images[:5], labels[:5])
    data = fashion(tmp_path)
    np.testing.assert_array_equal(data.test.x, images[:5].reshape(5, 784) / np.float32(255))
    np.testing.assert_array_equal(data.test.y, labels[:5])
    # Shuffled, images together with their labels, and the same way each time.
    where = [
        int(np.argmax((images.reshape(20, 784) / np.float32(255) == x).all(1)))
        for x in data.train.x
    ]
    assert sorted(where) == list(range(20))
    assert where != list(range(20))
    np.testing.assert_array_equal(data.train.y, labels[where])
    np.testing.assert_array_equal(fashion(tmp_path).train.y, data.train.y)


def test_without_the_files_it_says_where_they_come_from(tmp_path, capsys):
    with pytest.raises(SystemExit):
        fashion(tmp_path)
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err


def test_rows_of_another_run_are_not_taken(tmp_path):
    settings = {"seeds": 5, "epochs": 30, "tune": 10}
    assert qat_fashion.read_parts(tmp_path, settings) == {}
    record = {"settings": settings, "rows": {"lsq_4": {"bits": 4}}}
    (tmp_path / "rows.json").write_text(json.dumps(record))
    assert qat_fashion.read_parts(tmp_path, settings) == {"lsq_4": {"bits": 4}}
    assert qat_fashion.read_parts(tmp_path, {**settings, "tune": 5}) == {}
