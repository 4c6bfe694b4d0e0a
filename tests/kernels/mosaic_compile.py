"""Compiles the kernels for Hopper and Blackwell with Mosaic, and reads the machine code.

python tests/kernels/mosaic_compile.py [--write] [OP ...]: through XLA down to SASS. Is the
matrix instruction there, do registers spill, does a tile fit? Nothing runs. `--write` makes
expected_mosaic.json anew.
"""

import concurrent.futures
import functools
import importlib.metadata
import multiprocessing
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import triton

import xla_gpu

MADE = xla_gpu.FOLDER / "mosaic"
MADE.mkdir()
os.environ["MOSAIC_GPU_DUMP_TO"] = str(MADE)

import jaxcompress as jc
from cases import Shape, int8_case
from expected import Report
from jaxcompress.kernels.int8_matmul import pallas_gpu as int8_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = {"9.0": "sm_90a", "10.0": "sm_100a"}
MATMUL = {"9.0": "IGMMA", "10.0": "UTCIMMA"}
INT8 = {
    "4096 x 4096 x 4096": int8_case(4096, 4096, 4096, transpose_w=True),
    "2048 x 4096 x 4096, w[k, n]": int8_case(2048, 4096, 4096),
    "16 x 4096 x 4096": int8_case(16, 4096, 4096, transpose_w=True),
    "1024 x 4096 x 4096, bias, gelu, int8": int8_case(
        1024, 4096, 4096, codes=True, transpose_w=True
    ),
    "129 x 1000 x 1000, zero points, float32": int8_case(
        129, 1000, 1000, zero=True, dtype="float32"
    ),
}


def facts_of(case, chip, device, block=None):
    """The matrix instructions, registers a thread, spills, and copies, of the machine code."""
    args, options = case
    run = functools.partial(int8_kernel.int8_matmul, chip=chip, block=block, **options)
    made, _ = xla_gpu.compiled(xla_gpu.lowered(run, args, device))
    [ptx] = MADE.glob("*.ptx")
    object_file = MADE / "kernel.cubin"
    ask = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True)
    said = ask(
        TOOLS / "ptxas-blackwell", "-v", f"-arch={ARCHITECTURES[chip]}", ptx, "-o", object_file
    ).stderr
    code = ask(TOOLS / "nvdisasm", object_file).stdout
    for file in MADE.iterdir():
        file.unlink()
    text = made.as_text()
    return {
        "calls": re.findall(r'custom_call_target="([^"]+)"', text),
        "matmul": sorted(set(re.findall(r"\b(?:IGMMA|UTCIMMA|IMMA)\b", code))),
        "copies": sorted(set(re.findall(r"\bUTMA\w+", code))),
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "temporary": made.memory_analysis().temp_size_in_bytes,
    }


def verdict(facts, chip):
    if facts["matmul"] != [MATMUL[chip]]:
        return f"not {MATMUL[chip]}: {facts}"
    if facts["spills"]:
        return f"registers are spilled: {facts}"
    if not {"UTMALDG", "UTMASTG"} <= {*facts["copies"]}:
        return f"tiles are not copied as such: {facts}"
    return None


def checks(chip):
    """The arguments of a report for all cases of a chip."""
    device = xla_gpu.described(next(c for c in xla_gpu.CHIPS if c.capability == chip))
    rows = []
    for case, arguments in INT8.items():
        facts = facts_of(arguments, chip, device)
        rows.append((case, facts, verdict(facts, chip)))
    run = functools.partial(jc.ops.int8_matmul, implementation="pallas_gpu")
    arrays = Shape((3, 16, 256), jnp.int8), Shape((256, 512), jnp.int8)
    with xla_gpu.at_hand(device):
        program = xla_gpu.lowered(jax.vmap(run, (0, None)), arrays, device)
    wrong = None if "mosaic_gpu" in xla_gpu.compiled(program)[0].as_text() else "no kernel"
    rows.append(("called by the op, mapped", None, wrong))
    for file in MADE.iterdir():
        file.unlink()
    # More slots than fit shared memory, and a tile whose sums do not fit registers.
    case = INT8["4096 x 4096 x 4096"]
    tile = int8_kernel.blocks(4096, 4096, 4096, chip)
    try:
        facts_of(case, chip, device, tile._replace(slots=5))
        wrong = "it is compiled"
    except ValueError as error:
        wrong = None if "exceeds available shared memory" in str(error) else str(error)
    rows.append(("refused, five slots", None, wrong))
    if chip == "9.0":
        large = tile._replace(m=256, slots=1)
        found = verdict(facts_of(case, chip, device, large), chip)
        wrong = None if found and "spilled" in found else f"not seen: {found}"
        rows.append(("refused, a tile that spills", None, wrong))
    return rows


def main():
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-cuda13-plugin")}
    report = Report("expected_mosaic.json", versions)
    # A process for each chip: Mosaic hands every kernel to ptxas for the first that it met.
    one = dict(mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    if report.wants("int8_matmul"):
        with concurrent.futures.ProcessPoolExecutor(1, **one) as pool:
            for chip, rows in zip(MATMUL, pool.map(checks, MATMUL)):
                for row in rows:
                    report.check("int8_matmul", "pallas_gpu", chip, *row)
    report.finish()


if __name__ == "__main__":
    main()
