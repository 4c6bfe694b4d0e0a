"""The page says of the compilers what the checked-in tables say."""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_the_page_has_the_bundles_beside_those_of_jax():
    page = (HERE.parent.parent / "docs" / "kernels.md").read_text()
    rows = {}
    for name, facts in json.loads((HERE / "expected_peers.json").read_text())["kernels"].items():
        op, _, rest = name.split(" ", 2)
        chip, tile = rest.split(": beside JAX's, ")
        rows.setdefault((op, tile), {})[chip] = (facts[op]["body"], facts["jax"]["body"])
    for (op, tile), chips in rows.items():
        cells = [
            f"{ours}, {theirs}" for ours, theirs in map(chips.get, ("v5e", "v5p", "v6e", "tpu7x"))
        ]
        assert f"| `{op}` | {tile} | {' | '.join(cells)} |" in page
