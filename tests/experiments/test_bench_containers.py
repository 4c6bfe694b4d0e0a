"""The speed table of the containers: its break-evens, its cells, and the page against its JSON."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import bench_containers
import update_readme


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        # Times 2 and 1/2 at 50 and 80 %: the line between them is 1 at two thirds of the way.
        ((0.5, 2.0), "70%"),
        ((2.0, 4.0), "below 50%"),
        ((0.5, 0.9), "none"),
        ((2.0, 0.9), "none"),  # faster once, and not beyond
        ((), "none"),
    ],
)
def test_break_even(ratios, said):
    assert bench_containers.break_even(list(zip((0.5, 0.8), ratios))) == said


def row(name, sparsity, ratio, *uses):
    return dict(
        name=name,
        sparsity=sparsity,
        rows=1,
        min_ms=2.0,
        minima_of_float32=ratio,
        minima_of_w8a8=ratio / 4,
        runs_as=list(uses),
    )


def test_a_bitmap_that_runs_dense_has_no_break_even():
    rows = [row(bench_containers.FLOAT, s, 1.0) for s in (0.5, 0.9)]
    rows += [row("bitmap, float32", 0.5, 1.1, "a dense float product")]
    rows += [row("bitmap, float32", 0.9, 3.0, "sparse_matmul, cpu: native")]
    lines = bench_containers.tables(rows)
    assert "| 1 row | 50% | 90% | gains from | against w8a8 from |" in lines
    assert "| dense, float32 | 2.00 ms | 2.00 ms | | |" in lines
    assert "| bitmap, float32 | 1.10 (dense) | 3.00 | below 90% | none |" in lines


def test_the_page_has_the_tables_of_its_json():
    page = update_readme.PRUNING.read_text()
    assert update_readme.replaced(page, "bench_containers", "x\n") != page
    for results in (ROOT / "experiments/results").glob("bench_containers.json"):
        block = update_readme.containers_block(json.loads(results.read_text()))
        assert update_readme.replaced(page, "bench_containers", block) == page
