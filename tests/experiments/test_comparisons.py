"""The benchmarks beside other libraries: what they make of times and accuracies."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

import compare_pruners
from _compare_report import step_rows, table

TIMES = {"dense": [1.0, 2.0, 4.0], "slow": [3.0, 4.0, 20.0]}


def test_ratios_are_to_the_dense_step():
    dense, slow = step_rows("mlp", TIMES, {"dense": 0.5, "slow": 1.5}, "dense")
    assert (dense["ratio_of_minima"], dense["ratio_of_medians"]) == (1, 1)
    assert dense["ratio_of_pairs"] == [1, 1]
    assert (slow["ratio_of_minima"], slow["ratio_of_medians"]) == (3, 2)
    # The rounds' ratios are 3, 2, 5: a tenth of the way from 2 to 5 by way of 3.
    assert slow["ratio_of_pairs"] == pytest.approx([2.2, 4.6])
    assert slow["compile_s"] == 1.5


def test_a_table_has_a_line_for_each():
    rows = step_rows("mlp", TIMES, {"dense": 0.5, "slow": 1.5}, "dense")
    assert table(rows).splitlines()[-1] == "| mlp | slow | 4.00 | 3.00 | 2.00 | 2.20-4.60 | 1.5 |"


def test_accuracies_are_compared_seed_by_seed():
    rows = compare_pruners.summary({"dense": [90.0, 94.0], "pruned": [89.0, 91.0]})
    assert rows["pruned"]["mean"] == 90
    assert rows["pruned"]["from_dense"] == -2
    assert rows["pruned"]["standard_error"] == pytest.approx(1)  # gaps -1 and -3
    assert compare_pruners.summary({"dense": [90.0]})["dense"]["standard_error"] is None
