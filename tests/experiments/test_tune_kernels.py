"""The search for blocks, as far as it goes without a device: its steps, and what it writes."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import _kernel_problems as problems
import tune_kernels
from jaxcompress.kernels.block_table import PATH
from jaxcompress.ops import _int8_matmul, _kernels

TABLE = json.loads(PATH.read_text())
SLOT = tune_kernels.Slot("int8_matmul", 0, problems.int8, (64, 128, 128), (256, 128, 128))


@pytest.mark.parametrize("seed", range(5))
def test_a_climb_ends_where_no_neighbour_is_faster(seed):
    rng = np.random.default_rng(seed)
    cost = {}
    time = lambda tile: cost.setdefault(tile, None if rng.random() < 0.2 else rng.uniform(1, 9))
    near = functools.partial(
        tune_kernels.neighbours, least=(16, 16, 16, 1, 1), most=(128, 128, 128, 8, 5)
    )
    start = (64, 64, 64, 4, 3)
    best, times = tune_kernels.climb(start, near, time)
    assert times == cost
    assert cost[best] is not None
    assert set(near(best)) <= set(times)
    assert all(t is None or t >= 0.98 * cost[best] for t in map(cost.get, near(best)))


def test_a_climb_stays_where_nothing_runs():
    assert tune_kernels.climb((4,), lambda tile: [(8,)], lambda tile: None)[0] == (4,)


def test_neighbours_are_one_step_away_within_bounds():
    near = tune_kernels.neighbours((32, 64, 16, 8, 3), (32, 16, 16, 1, 1), (64, 64, 32, 8, 3))
    assert near == [
        (64, 64, 16, 8, 3),
        (32, 32, 16, 8, 3),
        (32, 64, 32, 8, 3),
        (32, 64, 16, 4, 3),
        (32, 64, 16, 8, 2),
    ]


@pytest.mark.parametrize("name", ["pallas_tpu", "triton"])
def test_every_tile_of_the_table_has_a_slot_that_it_is_within(name):
    places = {(slot.op, slot.place) for slot in tune_kernels.SLOTS[name]}
    assert places == {(op, i) for op in TABLE for i in range(len(TABLE[op][name]["default"]))}
    for slot in tune_kernels.SLOTS[name]:
        for tiles in TABLE[slot.op][name].values():
            bounds = zip(slot.least, tiles[slot.place], slot.most)
            assert all(low <= size <= high for low, size, high in bounds), (slot, tiles)


def test_the_table_is_written_as_it_is_kept():
    assert tune_kernels.written(TABLE) == PATH.read_text()
    found = [{"op": "nm_matmul", "place": 1, "to": [1, 2, 3, 4, 5]}]
    more = tune_kernels.refilled(TABLE, "triton", "9.9", found)
    assert more["nm_matmul"]["triton"]["9.9"] == [
        TABLE["nm_matmul"]["triton"]["default"][0],
        [1, 2, 3, 4, 5],
    ]
    del more["nm_matmul"]["triton"]["9.9"]
    assert more == TABLE


def test_tiles_are_really_taken_and_the_wrong_ones_thrown_out(monkeypatch):
    """The kernel for TPUs in the interpreter; the table is as before in the end."""
    kernel = _kernels.kernel_module("int8_matmul", "pallas_tpu")
    before, taken, right = dict(kernel.BLOCKS), [], kernel.int8_matmul

    def counted(x, w, *rest, **options):
        tile = kernel.blocks(256, 128, 128, options["chip"])
        taken.append(tile)
        if tile == (64, 128, 128):
            raise ValueError("too large\nor not")
        out = right(x, w, *rest, **options)
        return out + 1 if tile == (256, 128, 128) else out

    run = lambda table, problem, implementation, *args: table[2].run(*args)
    monkeypatch.setattr(_int8_matmul, "dispatch", run)
    monkeypatch.setattr(_kernels, "_for_tpus", lambda run: run)  # in a program for the CPU
    monkeypatch.setattr(_int8_matmul, "chip", lambda platform: "TPU v5 lite")
    monkeypatch.setattr(kernel, "int8_matmul", counted)
    monkeypatch.setitem(kernel.BLOCKS, "TPU v5 lite", ((128, 128, 128),))
    with pltpu.force_tpu_interpret_mode():
        record = tune_kernels.tune(SLOT, (256, 128, 128), "pallas_tpu", "TPU v5 lite", 1)
    tried = {tuple(row["tile"]): row for row in record["tried"]}
    assert set(tried) == set(taken) == {(64, 128, 128), (128, 128, 128), (256, 128, 128)}
    assert tried[64, 128, 128]["why not"] == "too large"
    assert tried[256, 128, 128]["why not"] == "wrong"
    assert record["to"] == [128, 128, 128]
    assert tried[128, 128, 128]["milliseconds"] > 0
    assert before | {"TPU v5 lite": ((128, 128, 128),)} == kernel.BLOCKS
