"""The table of the page is that of its JSON, and the JSON has what the page claims."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import deep_compression

RECORD = json.loads((ROOT / "experiments/results/deep_compression.json").read_text())


def test_the_page_has_the_table_of_the_json():
    page = (ROOT / "docs/pruning.md").read_text()
    assert deep_compression.table(RECORD) in page
    for text in (page, (ROOT / "README.md").read_text()):
        assert deep_compression.summary(RECORD) in text.replace("\n", " ")


def test_as_small_as_the_paper_at_no_loss():
    for name, times in (("LeNet-300-100", 40), ("LeNet-5", 39)):
        best = deep_compression.chosen(RECORD["networks"][name])
        assert best["smaller"] >= times
        assert best["against_dense"]["high"] >= 0
        assert len(best["bytes"]["coded"]) == len(RECORD["environment"]["seeds"]) == 5
    assert not RECORD["environment"]["commit"].endswith("+")


def test_the_level_is_chosen_on_the_validation_digits():
    """Not on the test accuracy, and never one of the dense networks."""
    row = lambda validation, smaller: dict(
        validation=validation, smaller=smaller, accuracy=smaller, seeds=[0.9] * 5
    )
    # One standard error of 2,500 answers at 90 % is 0.6 points.
    rows = [row(0.9, 1), row(0.99, 1), row(0.95, 30), row(0.895, 60), row(0.893, 90)]
    assert deep_compression.chosen(rows) is rows[3]
    assert deep_compression.chosen([row(1.0, 1), row(1.0, 1), row(0.9, 30)]) is None
