"""Every check of the kernels that needs no device: make test-kernels.

python tests/kernels/run.py: the suites in the interpreters, compilation for all chips
against the checked-in tables, and planted faults. Ends with the number of checks.
"""

import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
AT_A_TIME = 2
NOISE = ("InitGoogle", "nvdisasm invocation failed")  # the second of Mosaic, which does without
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]
STEPS = {
    "compiled for TPUs": ([str(HERE / "tpu_compile.py")], {}),
    "run in Triton's interpreter": (
        [*PYTEST, str(HERE / "check_triton.py")],
        {"TRITON_INTERPRET": "1", "KERNEL_EXAMPLES": "30"},
    ),
    "compiled for GPUs": ([str(HERE / "triton_compile.py")], {}),
    "whole programs compiled for GPUs": ([str(HERE / "xla_gpu_compile.py")], {}),
    "run in Pallas' interpreter": (
        [*PYTEST, str(HERE / "test_pallas_tpu.py")],
        {"KERNEL_EXAMPLES": "12"},
    ),
    "compiled by Mosaic for GPUs": ([str(HERE / "mosaic_compile.py")], {}),
    "run in Pallas' interpreter for GPUs": (
        [*PYTEST, str(HERE / "check_pallas_gpu.py")],
        {"KERNEL_EXAMPLES": "2"},
    ),
    "beside JAX's own kernel": ([str(HERE / "tpu_peers.py")], {}),
    "planted faults": ([str(HERE / "faults.py")], {}),
}


def run(step):
    """What a step printed, how many checks it made, and whether all held."""
    arguments, environment = STEPS[step]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE)))
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    counts = re.findall(r"^(\d+) (?:checks|passed)", done.stdout, re.MULTILINE)
    count = int(counts[-1]) if counts else 0
    return done, count, time.monotonic() - begin


def main():
    needed = ("jax_cuda13_plugin", "jax_triton", "libtpu", "triton")
    missing = [p for p in needed if not importlib.util.find_spec(p)]
    if missing:
        sys.exit(f"the kernel checks need {', '.join(missing)}: make test-kernels installs them")
    total = failed = 0
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
        for step, (done, count, seconds) in zip(STEPS, pool.map(run, STEPS)):
            bad = done.returncode != 0 or not count
            print(f"== {step}: {count} checks in {seconds:.0f} s{', FAILED' if bad else ''}")
            lines = done.stdout.splitlines()
            print("\n".join(line for line in lines if not any(noise in line for noise in NOISE)))
            total, failed = total + count, failed + bad
    print(f"{total} checks of (op, backend, target), {failed} steps failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
