"""The table of the page is that of its JSON, and the JSON has what the page claims."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import ptq_digits

RECORD = json.loads((ROOT / "experiments/results/ptq_digits.json").read_text())


def test_the_page_has_the_table_of_the_json():
    assert ptq_digits.table(RECORD) in (ROOT / "docs/quantization.md").read_text()


def test_gptq_has_less_error_than_its_peer_on_the_same_networks():
    errors = {(row["method"], row["width"]): row["error"] for row in RECORD["rows"]}
    # At two bits symmetric codes are three, those of the peer four.
    for name, bits in (("GPTQ", 4), ("GPTQ asymmetric", 4), ("GPTQ asymmetric", 2)):
        pairs = zip(errors[name, bits]["seeds"], errors["qwix GPTQ", bits]["seeds"], strict=True)
        assert all(ours < theirs for ours, theirs in pairs)
    assert errors["GPTQ", 2]["mean"] < errors["qwix GPTQ", 2]["mean"]
    assert not RECORD["environment"]["commit"].endswith("+")
    assert len(RECORD["environment"]["seeds"]) == 5
