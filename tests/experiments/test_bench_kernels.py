"""The benchmark of kernels, as far as it goes without a device."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxcompress as jc

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import _kernel_problems as problems
import bench_kernels


@pytest.mark.parametrize("script", ["bench_kernels.py", "tune_kernels.py"])
def test_without_a_device_it_says_so_in_one_line(script):
    script = ROOT / "experiments" / script
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: this needs a GPU or TPU; jax has found only 'cpu'\n"


def test_every_op_is_in_the_full_run():
    names = "\n".join(bench_kernels.all_rows(False))
    for what in ("int8 x int8, bias", "3 bits", "int8 x 4 bits", "2:4, int8", "gradients"):
        assert what in names


PROBLEMS = {
    "int8": problems.int8(3, 70, 5),
    "int8_then": problems.int8_then(16, 70, 5),
    "3 bits": problems.weight(3, 70, 5, 3, 32),
    "w4a8": problems.weight(3, 70, 5, 4, 32, integers=True),
    "2:4": problems.two_of_four(3, 72, 5),
    "2:4, int8": problems.two_of_four(3, 72, 5, integers=True),
    "blocks": problems.blocks(3, 96, 64, 16),
    "blocks, gradients": problems.blocks(3, 96, 64, 16, trains=True),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_answers_are_those_of_the_formula(name):
    """The reference stands in for a kernel: it is right, and both have a time; one off is not."""
    problem = PROBLEMS[name]
    row = bench_kernels.measure(problem, ["reference"], 1)
    assert row["right"]
    assert row["milliseconds"]["reference"] > 0
    for i, want in enumerate(problem.want):
        off = [*problem.want]
        off[i] = want + (2 if name.startswith("int8_then") else 1)
        assert problem.is_right(problem.want)
        assert not problem.is_right(off)


def test_the_gradients_are_those_of_float64():
    """By the definition, for one number of each: the reference might share a mistake."""
    problem = PROBLEMS["blocks, gradients"]
    x, kept, rows, counts, g = (np.asarray(a, np.float64) for a in problem.args)
    dx, dkept = problem.want
    column = int(np.argmax(counts > 0))
    row = int(rows[column, 0])
    want = x[:, row * 16 : row * 16 + 16].T @ g[:, column * 16 : column * 16 + 16]
    np.testing.assert_allclose(dkept[column, 0], want)
    unused = int(np.argmin(counts))
    assert np.all(dkept[unused, int(counts[unused]) :] == 0)
    at = np.zeros(16)
    for c in range(len(counts)):
        for slot in range(int(counts[c])):
            if rows[c, slot] == row:
                at += kept[c, slot] @ g[0, c * 16 : c * 16 + 16]
    np.testing.assert_allclose(dx[0, row * 16 : row * 16 + 16], at)


def test_a_wrong_product_is_not_timed(monkeypatch):
    right = jc.ops.int8_matmul
    wrong = lambda x, w, **options: right(x, w, **options).at[0, 0].add(1)
    monkeypatch.setattr(jc.ops, "int8_matmul", wrong)
    row = bench_kernels.measure(problems.int8(9, 70, 5), ["reference"], 1)
    assert not row["right"]
    assert "milliseconds" not in row
