"""The page says of the compilers what the checked-in tables say."""

import json
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PAGE = (HERE.parent.parent / "docs" / "kernels.md").read_text()
# Bytes of shared memory of a multiprocessor, by compute capability: NVIDIA's programming guide.
MEMORY = {"8.0": 164, "8.6": 100, "8.9": 100, "9.0": 228, "10.0": 228, "12.0": 100}


def facts_of(table):
    return json.loads((HERE / table).read_text())["kernels"].items()


@pytest.mark.parametrize(
    ("table", "peer", "beside"),
    [
        ("expected_peers.json", "jax", ": beside JAX's, "),
        ("expected_tokamax.json", "tokamax", ": beside tokamax's, "),
    ],
)
def test_the_page_has_the_bundles_beside_those_of_others(table, peer, beside):
    rows = {}
    for name, facts in facts_of(table):
        op, _, rest = name.split(" ", 2)
        chip, tile = rest.split(beside)
        rows.setdefault((op, tile), {})[chip] = (facts[op]["body"], facts[peer]["body"])
    assert len(rows) == 3
    for (op, tile), chips in rows.items():
        cells = [
            f"{ours}, {theirs}" for ours, theirs in map(chips.get, ("v5e", "v5p", "v6e", "tpu7x"))
        ]
        assert f"| `{op}` | {tile} | {' | '.join(cells)} |" in PAGE


def test_the_page_says_how_many_programs_leave_room_for_two_blocks():
    """Registers and shared memory for two on a multiprocessor; a block has a kilobyte more."""
    room = []
    for name, facts in facts_of("expected_triton.json"):
        chip = name.split(": ")[0].split()[-1]
        if chip in MEMORY and "registers" in facts:
            registers = -(-facts["registers"] // 8) * 8 * 32 * facts["warps"]
            shared = facts["shared"] + 1024
            room.append(2 * registers <= 65536 and 2 * shared <= MEMORY[chip] * 1024)
    assert f"Of {len(room)} programs for NVIDIA's chips, {sum(room)} leave room" in PAGE
