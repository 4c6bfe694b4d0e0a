"""The report's statistics and sentences, and the README's table against its JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import _digits_report as report
import _harness as harness
import update_readme
from jaxcompress.arrays._uses import Use

ROWS = [
    Use("a", "QuantizedArray", "dot_general", "int8_matmul", "xla", "integers by XLA", 10),
    Use("b", "QuantizedArray", "dot_general", "int8_matmul", "xla", "integers by XLA", 10),
    Use("c", "BitmapSparseArray", "expand", "bitmap", "reference", "zeros are put back", 10),
]


def test_why_follows_the_measurement():
    """The sentence is derived: another measurement, another sentence."""
    slow, fast, same = (report.why(ROWS, ratio, 128) for ratio in (2.5, 0.4, 1.02))
    assert "2.5 times as long as dense" in slow
    assert "2.5 times as fast as dense" in fast
    assert "1.02 of the time of dense" in same
    assert len({slow, fast, same}) == 3


def test_why_follows_explain():
    sentence = report.why(ROWS, 2.0, 1)
    assert "integers by XLA, for 2 weights" in sentence
    assert "zeros are put back, for 1 weights" in sentence
    assert report.why([], 1.0, 1) != sentence


def test_paired_interval_is_that_of_the_difference():
    random = np.random.default_rng(1)
    dense = random.random((5, 1000)) < 0.9
    worse = dense & (random.random((5, 1000)) < 0.98)
    found = report.accuracy_against(worse, dense)
    assert found["points"] == pytest.approx(100 * (worse.mean() - dense.mean()))
    assert found["low"] < found["points"] < found["high"] < 0
    # Against itself nothing varies, whatever the accuracy: the interval is a point.
    assert report.accuracy_against(dense, dense) == {"points": 0, "low": 0, "high": 0}
    # Unpaired, the standard error alone would be 100 * sqrt(2 * .9 * .1 / 5000) = 0.6 points.
    assert found["high"] - found["low"] < 1.2


def test_readme_has_the_table_of_its_json():
    record = json.loads((ROOT / "experiments/results/compress_digits.json").read_text())
    readme = (ROOT / "README.md").read_text()
    block = update_readme.digits_block(record)
    assert update_readme.replaced(readme, "compress_digits", block) == readme


def test_goal_of_the_main_job():
    """At least 20 times smaller, within half a point of dense."""
    record = json.loads((ROOT / "experiments/results/compress_digits.json").read_text())
    by_name = {v["name"]: v for v in record["variants"]}
    small, dense = by_name["pruned_int4"], by_name["dense"]
    assert dense["file_bytes"] / small["file_bytes"] >= 20
    assert small["accuracy_vs_dense"]["points"] >= -0.5
    assert small["sparsity"] >= 0.9
    assert len(record["environment"]["seeds"]) == 5


def test_staged_output_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "report"

    def fail_half_way():
        with harness.staged(out) as folder:
            (folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with harness.staged(out) as folder:
            (folder / "all").write_text(text)
        assert (out / "all").read_text() == text
    assert list(tmp_path.iterdir()) == [out]


def test_staged_output_leaves_foreign_folders_alone(tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(SystemExit), harness.staged(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sedes", "3"], "unrecognized arguments: --sedes"),
        (["--seeds", "0"], "--seeds and --epochs are 1 or more"),
        (["--quick", "--out", "/proc/report"], "cannot write to /proc"),
    ],
)
def test_wrong_use_is_one_line(arguments, said):
    script = ROOT / "experiments" / "compress_digits.py"
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_missing_package_is_one_line():
    code = (
        "import sys; sys.path.insert(0, 'experiments'); from _harness import need; need('absent')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: this experiment needs absent: pip install")
    assert done.stderr.count("\n") == 1
