"""What share of this CPU a product uses: of its peak, or with one row of its memory."""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["peak", "share"]

# Bytes of a weight, and which peak bounds its product where memory does not.
KINDS = {
    "XLA f32": (4, "float32_gflops"),
    "onnxruntime f32": (4, "float32_gflops"),
    "OpenVINO f32": (4, "float32_gflops"),
    "torch f32": (4, "float32_gflops"),
    "w8a8": (1, "int8_gops"),
    "onnxruntime dynamic int8": (1, "int8_gops"),
    "torch dynamic int8": (1, "int8_gops"),
    "w4a8 g128": (0.5 + 4 / 128, "int8_gops"),
    "onnxruntime int4 g128, int8 sums": (0.5 + 4 / 128, "int8_gops"),
}


def peak() -> dict[str, float] | None:
    """Measured now, on all cores; None, with one line that says why, where it cannot be."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(compiler[0]):
        print("no C++ compiler: shares of the machine's peak are not measured")
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "peak"))
        source = str(Path(__file__).with_suffix(".cc"))
        built = subprocess.run(
            [*compiler, "-O2", "-std=c++17", "-pthread", source, "-o", program], capture_output=True
        )
        ran = None if built.returncode else subprocess.run([program], capture_output=True)
        if ran is None or ran.returncode:
            print("not an x86 CPU with AVX-512 VNNI: shares of its peak are not measured")
            return None
        return json.loads(ran.stdout)


def share(name: str, m: int, k: int, n: int, ms: float, most: dict[str, float]) -> dict[str, Any]:
    """`{"of_peak": a fraction, "bound": of what}`, or nothing if the name is not known."""
    if name not in KINDS:
        return {}
    size, bound = KINDS[name]
    if m == 1:  # every weight is read for one product
        return {"of_peak": k * n * size * 1e-6 / ms / most["read_gb_s"], "bound": "read_gb_s"}
    return {"of_peak": 2 * m * k * n * 1e-6 / ms / most[bound], "bound": bound}
