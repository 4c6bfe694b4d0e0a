"""The benchmark of kernels, as far as it goes without a device."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxcompress as jc

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import bench_kernels


def test_without_a_device_it_says_so_in_one_line():
    script = ROOT / "experiments" / "bench_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: this needs a GPU or TPU; jax has found only 'cpu'\n"


def test_a_right_product_is_timed():
    """The reference stands in for a kernel: it is right, and both have a time."""
    for size in bench_kernels.QUICK:
        row = bench_kernels.measure(size, "reference", 1)
        assert row["right"]
        assert row["milliseconds"]["reference"] > 0


def test_a_wrong_product_is_not(monkeypatch):
    right = jc.ops.int8_matmul
    wrong = lambda x, w, **options: right(x, w, **options).at[0, 0].add(1)
    monkeypatch.setattr(jc.ops, "int8_matmul", wrong)
    row = bench_kernels.measure(bench_kernels.QUICK[0], "reference", 1)
    assert not row["right"]
    assert "milliseconds" not in row


@pytest.mark.parametrize("size", [(3, 70, 5, 3, 32), (3, 70, 5, 4, 32, True)])
def test_the_answers_are_those_of_the_formula(size):
    op, args, want, bound = bench_kernels.weight_problem(bench_kernels.Size(*size))
    got = np.asarray(op(*args, implementation="reference"), np.float64)
    assert np.all(np.abs(got - want) <= bound)
    assert np.any(np.abs(got - want - 1) > bound)
