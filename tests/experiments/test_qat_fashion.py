"""The parts that an interrupted run of qat_fashion goes on from."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

import qat_fashion


def test_rows_of_another_run_are_not_taken(tmp_path):
    settings = {"seeds": 5, "epochs": 30, "tune": 10}
    assert qat_fashion.read_parts(tmp_path, settings) == {}
    record = {"settings": settings, "rows": {"lsq_4": {"bits": 4}}}
    (tmp_path / "rows.json").write_text(json.dumps(record))
    assert qat_fashion.read_parts(tmp_path, settings) == {"lsq_4": {"bits": 4}}
    assert qat_fashion.read_parts(tmp_path, {**settings, "tune": 5}) == {}


def test_the_cnn_has_fewer_seeds_images_and_epochs():
    options = argparse.Namespace(seeds=5, epochs=30, tune=10, quick=False)
    assert qat_fashion.settings_of("lenet", options) == {
        "network": "lenet",
        "seeds": 5,
        "epochs": 30,
        "tune": 10,
        "images": 55_000,
    }
    cnn = qat_fashion.settings_of("cnn", options)
    assert (cnn["seeds"], cnn["epochs"], cnn["tune"], cnn["images"]) == (3, 10, 5, 20_000)
