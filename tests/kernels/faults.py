"""Breaks the kernels in six ways and sees their suites fail.

python tests/kernels/faults.py: each fault is put into a copy of the repository, and the
tests that it names have to fail there, and pass without it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
TPU = ["tests/kernels/test_pallas_tpu.py", "-k"]
GPU = ["tests/kernels/check_triton.py", "-k"]
HOPPER = ["tests/kernels/check_pallas_gpu.py", "-k"]


class Fault(NamedTuple):
    """What is wrong, in which kernel, the text it replaces, and the tests that notice."""

    name: str
    kernel: str
    old: str
    new: str
    tests: list[str]


FAULTS = [
    Fault(
        "an accumulator that is not reset",
        "int8_matmul pallas_tpu",
        "@pl.when(step == 0)",
        "@pl.when(step < 0)",
        [*TPU, "TestInt8Matmul and largest_products"],
    ),
    Fault(
        "cores that share a sum without a barrier",
        "int8_matmul pallas_tpu",
        '("parallel", "parallel", "parallel", "arbitrary")',
        '("arbitrary", "arbitrary", "arbitrary", "parallel")',
        [*TPU, "TestInt8Matmul and largest_products"],
    ),
    Fault(
        "the scales of another group",
        "quantized_matmul triton",
        "(start + part * span) // GROUP",
        "start // GROUP",
        [*GPU, "TestQuantizedMatmul and every_width_in_blocks"],
    ),
    Fault(
        "the sum of a group goes on into the next",
        "w4a8_matmul triton",
        "                total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)\n",
        "",
        [*GPU, "TestW4A8Matmul and scales_of_one"],
    ),
    Fault(
        "values that do not follow the order of their places",
        "nm_matmul triton_sparse",
        "return tl.where(ordered, a, b), tl.where(ordered, b, a)",
        "return a, b",
        [*GPU, "TestSparseTensorCores and shape1-int8"],
    ),
    Fault(
        "a slot that is filled again before it is free",
        "int8_matmul pallas_gpu",
        "plgpu.barrier_wait(empty.at[slot])",
        "pass",
        [*HOPPER, "largest_products and 127-127"],
    ),
]


def suite(folder, tests):
    """The exit code of pytest, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", "-x", *tests],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def verdict(fault, work):
    """None if the tests notice; else what went wrong."""
    folder = work / re.sub(r"\W", "-", fault.name)
    for part in ("jaxcompress", "kernels", "tests", "pyproject.toml"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, symlinks=True)
        else:
            shutil.copy2(source, folder / part)
    code, output = suite(folder, fault.tests)
    if code:
        return f"the tests fail without it:\n{output}"
    op, backend = fault.kernel.split()
    file = folder / "kernels" / op / f"{backend}.py"
    text = file.read_text()
    if text.count(fault.old) != 1:
        return f"{file.name} does not have {fault.old!r} once"
    file.write_text(text.replace(fault.old, fault.new))
    code, output = suite(folder, fault.tests)
    if code == 0:
        return "it is not noticed: the tests pass"
    if code != 1 or not re.search(r"\d+ failed", output):
        return f"the tests did not run (exit code {code}):\n{output}"
    return None


def main():
    failures = 0
    with tempfile.TemporaryDirectory() as work:
        for fault in FAULTS:
            wrong = verdict(fault, Path(work))
            failures += wrong is not None
            print(f"{fault.kernel} planted: {fault.name:42} {wrong or 'noticed'}", flush=True)
    print(f"{len(FAULTS)} checks, {failures} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
