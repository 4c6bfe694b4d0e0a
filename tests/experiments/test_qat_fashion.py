"""The parts that an interrupted run of qat_fashion goes on from."""

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
