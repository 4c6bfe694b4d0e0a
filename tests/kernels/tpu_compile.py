"""Compiles the kernels for four TPUs, without one, and reads the schedules.

python tests/kernels/tpu_compile.py [--write] [OP ...]: libtpu's own compiler takes each kernel for
each chip or refuses it. Its final schedule says which matrix instruction there is, how
many bundles the body has, and whether registers went to memory and back. That is evidence
of the code, not of its speed: nothing runs. `--write` makes expected_tpu.json anew.
"""

import functools
import importlib.metadata
import os
import re
import tempfile
from pathlib import Path

os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
DUMP = tempfile.TemporaryDirectory()
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP.name} --xla_jf_dump_llo_text=true"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from cases import (
    Shape,
    block_case,
    int8_case,
    nm_case,
    quantized_case,
    sampled_case,
    w4a8_case,
)
from expected import Report
from jaxcompress.kernels.block_sparse_matmul import pallas_tpu as block_kernel
from jaxcompress.kernels.int8_matmul import pallas_tpu as int8_kernel
from jaxcompress.kernels.nm_matmul import pallas_tpu as nm_kernel
from jaxcompress.kernels.quantized_matmul import pallas_tpu as quantized_kernel
from jaxcompress.kernels.w4a8_matmul import pallas_tpu as w4a8_kernel
from roofline import of_pallas

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


INT8 = {
    "4096 x 4096 x 4096": int8_case(4096, 4096, 4096),
    "1024 x 1000 x 1024, w[n, k], zero points": int8_case(
        1024, 1000, 1024, transpose_w=True, zero=True, dtype="float32"
    ),
    "129 x 5000 x 1000": int8_case(129, 5000, 1000),
    "1024 x 4096 x 4096, bias, gelu, int8": int8_case(1024, 4096, 4096, codes=True),
    "1 x 65 x 127": int8_case(1, 65, 127, dtype="float32"),
}
QUANTIZED = {
    "int8, 16 x 4096 x 4096": quantized_case(16, 4096, 4096, 8),
    "int4 by 128, 16 x 4096 x 4096": quantized_case(16, 4096, 4096, 4, 128),
    "int3 by 64, 1 x 11008 x 4096": quantized_case(1, 11008, 4096, 3, 64),
    "int2 by 32, zero points, 16 x 4096 x 4096": quantized_case(16, 4096, 4096, 2, 32, zero=True),
    "int4 by 128, 1024 x 4096 x 4096": quantized_case(1024, 4096, 4096, 4, 128),
    "int4 by 32, 129 x 5000 x 1000": quantized_case(129, 5000, 1000, 4, 32),
    "int6, float32, 7 x 65 x 127": quantized_case(7, 65, 127, 6, zero=True, dtype="float32"),
    "int8, w[n, k], 16 x 1000 x 1000": quantized_case(16, 1000, 1000, 8, transpose_w=True),
}
W4A8 = {
    "by 128, 16 x 4096 x 4096": w4a8_case(16, 4096, 4096, 128),
    "by 128, 1024 x 4096 x 4096": w4a8_case(1024, 4096, 4096, 128),
    "1 x 11008 x 4096": w4a8_case(1, 11008, 4096),
    "by 256, zero points, 129 x 5000 x 1000": w4a8_case(129, 5000, 1000, 256, zero=True),
}
BLOCKS = {
    "128x128, 4096 x 4096 x 4096": block_case(4096, 4096, 4096, (128, 128)),
    "128x128, int8, 16 x 4096 x 4096": block_case(16, 4096, 4096, (128, 128), weights="int8"),
    "512x512, turned, 4096 x 4096 x 4096": block_case(4096, 4096, 4096, (512, 512), turned=True),
    "128x384, float32, 127 x 1000 x 1500": block_case(127, 1000, 1500, (128, 384), dtype="float32"),
}
SAMPLED = {
    "128x128, 4096 x 4096 x 4096": sampled_case(4096, 4096, 4096, (128, 128)),
    "384x256, float32, 1000 x 1000 x 1000": sampled_case(1000, 1000, 1000, (384, 256), "float32"),
}
NM = {
    "2:4, 16 x 4096 x 4096": nm_case(16, 4096, 4096),
    "2:4, int8, 1024 x 4096 x 4096": nm_case(1024, 4096, 4096, weights="int8"),
    "2:4, int4 by 128, 16 x 4096 x 4096": nm_case(16, 4096, 4096, bits=4, group=128),
    "2:4, int8 x int8, 1024 x 4096 x 4096": nm_case(1024, 4096, 4096, dtype="int8"),
    "2:4, int8 x int8 scaled, 1024 x 4096 x 4096": nm_case(
        1024, 4096, 4096, dtype="int8", scaled=True
    ),
    "2:4, int8 x int4 scaled, 16 x 4096 x 4096": nm_case(
        16, 4096, 4096, dtype="int8", bits=4, scaled=True
    ),
    "4:8, float32, 129 x 5000 x 1000": nm_case(129, 5000, 1000, (4, 8), dtype="float32"),
}
KERNELS = {
    "block_sparse_matmul": (block_kernel.block_sparse_matmul, BLOCKS),
    "sampled_matmul": (block_kernel.sampled_matmul, SAMPLED),
    "int8_matmul": (int8_kernel.int8_matmul, INT8),
    "nm_matmul": (nm_kernel.nm_matmul, NM),
    "quantized_matmul": (quantized_kernel.quantized_matmul, QUANTIZED),
    "w4a8_matmul": (w4a8_kernel.w4a8_matmul, W4A8),
}
# What the compiler has to refuse, and a word of its reason.
REFUSED = {
    "more fast memory than there is": (
        int8_kernel.int8_matmul,
        (int8_case(8192, 8192, 8192)[0], dict(block=(8192, 8192, 512))),
        "vmem",
    ),
    "float16": (
        quantized_kernel.quantized_matmul,
        quantized_case(16, 512, 512, 8, dtype="float16"),
        "f16|float16",
    ),
}


def compiled(kernel, args, options, device):
    """The files that the compiler dumped on its way."""
    sharding = SingleDeviceSharding(device)
    place = lambda a: Shape(a.shape, a.dtype, sharding=sharding)
    placed = jax.tree.map(place, args)
    before = set(Path(DUMP.name).iterdir())
    jax.jit(functools.partial(kernel, chip=device.device_kind, **options)).lower(*placed).compile()
    return sorted(set(Path(DUMP.name).iterdir()) - before)


def schedule(op, files):
    """The matrix instructions, the bundles, and the spills of the kernel's body."""
    [bundles] = [f for f in files if re.search(rf"\d-{op}[.\d]*-\d+-final_bundles.txt", f.name)]
    [usage] = [f for f in files if re.search(rf"\d-{op}[.\d]*-\d+-final_hlo-static", f.name)]
    kinds = re.findall(r"\bvmatmul[\w.]*?\.(s4|s8|u8|bf16|f32|f8\w*)\b", bundles.read_text())
    lines = usage.read_text().splitlines()
    head = [name.strip() for name in lines[1].split(",")]
    rows = [list(map(int, line.split())) for line in lines[4:] if line.strip()]
    total = lambda name: sum(row[head.index(name)] for row in rows)
    return {
        "matmul": sorted(set(kinds)),
        "bundles": len(rows),
        "spills": total("VSTORE:SPILL"),
        "fills": total("VLOAD:FILL"),
    }


def verdict(facts):
    if not facts["matmul"]:
        return f"no matrix instruction: {facts}"
    if facts["spills"] or facts["fills"]:
        return f"registers are spilled: {facts}"
    return None


def check_compiles(report, chip, device):
    for op, (kernel, cases) in KERNELS.items():
        if not report.wants(op):
            continue
        for case, (args, options) in cases.items():
            facts = schedule(op, compiled(kernel, args, options, device))
            report.check(op, "pallas_tpu", chip, case, facts, verdict(facts))


def check_refusals(report, chip, device):
    for case, (kernel, (args, options), reason) in REFUSED.items():
        op = kernel.__name__
        try:
            compiled(kernel, args, options, device)
        except Exception as error:
            said = re.search(reason, str(error), re.IGNORECASE)
            wrong = None if said else f"refused for another reason: {str(error)[:200]}"
        else:
            wrong = "not refused"
        report.check(op, "pallas_tpu", chip, f"refused, {case}", wrong=wrong)


def check_rooflines(report, chip, device):
    run = functools.partial(int8_kernel.int8_matmul, chip=device.device_kind, dtype="bfloat16")
    line = of_pallas(run, INT8["4096 x 4096 x 4096"][0], 2 * 4096**3, chip, "int8")
    wrong = None if line.intensity > line.ridge else f"bound by memory: {line}"
    facts = {"operations a byte": round(line.intensity), "ridge": round(line.ridge)}
    report.check("int8_matmul", "pallas_tpu", chip, "roofline, 4096 x 4096 x 4096", facts, wrong)
    few = [("quantized_matmul", case, "bfloat16") for case in list(QUANTIZED)[:4]]
    few.append(("w4a8_matmul", "by 128, 16 x 4096 x 4096", "int8"))
    few.append(("nm_matmul", "2:4, 16 x 4096 x 4096", "bfloat16"))
    few.append(("nm_matmul", "2:4, int4 by 128, 16 x 4096 x 4096", "bfloat16"))
    few.append(("nm_matmul", "2:4, int8 x int4 scaled, 16 x 4096 x 4096", "int8"))
    for op, case, kind in few:
        kernel, cases = KERNELS[op]
        args, options = cases[case]
        run = functools.partial(kernel, chip=device.device_kind, **options)
        m, k, n = *args[0].shape[1:], args[2].shape[-1]
        line = of_pallas(run, args, 2 * m * k * n, chip, kind)
        wrong = None if line.moved <= 1.05 * line.least else f"more bytes than needed: {line}"
        facts = {"bytes": line.moved, "at least": line.least}
        report.check(op, "pallas_tpu", chip, f"roofline, {case}", facts, wrong)


def check_blocks(report, chip, device):
    """Uneven columns: every fourth block is kept, in columns of which one has half of them."""
    args, options = BLOCKS["128x128, int8, 16 x 4096 x 4096"]
    e, count = args[2].shape[2], options["count"]
    lines = np.sort(np.where(np.arange(e) % 2, 5, np.arange(e) % count)).astype(np.int32)
    lists = [a.reshape(1, 1, e) for a in (lines, np.arange(e, dtype=np.int32) % 32)]
    lists.append(np.arange(e, dtype=np.int32).reshape(1, 1, e))
    known = [np.asarray(a).reshape(-1) for a in block_kernel.steps(*lists, count)]
    run = functools.partial(block_kernel.block_sparse_matmul, chip=device.device_kind, **options)
    line = of_pallas(run, args, 2 * 16 * e * 128 * 128, chip, "bfloat16", known)
    wrong = None if line.moved <= 1.05 * line.least else f"more bytes than needed: {line}"
    facts = {"bytes": line.moved, "at least": line.least}
    report.check(
        "block_sparse_matmul", "pallas_tpu", chip, "roofline, 16 rows, uneven", facts, wrong
    )


def check_memory(report, chip, device):
    """The op, which takes the kernel by itself, makes no float weight; XLA's product does."""
    args, options = QUANTIZED["int4 by 128, 16 x 4096 x 4096"]
    sharding = SingleDeviceSharding(device)
    flat = [Shape(a.shape[1:], a.dtype, sharding=sharding) for a in args]
    facts = {}
    for name, implementation in (("kernel", None), ("reference", "reference")):
        run = functools.partial(jc.ops.quantized_matmul, implementation=implementation, **options)
        memory = jax.jit(run).lower(*flat).compile().memory_analysis()
        facts[name] = memory.temp_size_in_bytes
    weight = 2 * 4096 * 4096  # in bfloat16
    wrong = None if facts["kernel"] < weight / 10 else f"a float weight: {facts}"
    wrong = wrong if facts["reference"] >= weight else f"XLA makes none either: {facts}"
    report.check("quantized_matmul", "pallas_tpu", chip, "temporary bytes", facts, wrong)


def check_eight_bit_floats(report, chip, device):
    """XLA's own product of them: a TPU7x multiplies them as they are, the others widen them."""
    place = lambda *shape, kind=jnp.float32: Shape(
        shape, kind, sharding=SingleDeviceSharding(device)
    )
    run = lambda x, w, x_scale, w_scale: jc.ops.scaled_matmul(
        x, w, x_scale=x_scale, w_scale=w_scale, dtype=jnp.bfloat16, implementation="xla"
    )
    float8 = functools.partial(place, kind=jnp.float8_e4m3fn)
    before = set(Path(DUMP.name).iterdir())
    args = float8(256, 512), float8(512, 256), place(256, 1), place(1, 256)
    jax.jit(run).lower(*args).compile()
    dumped = set(Path(DUMP.name).iterdir()) - before
    bundles = "".join(f.read_text() for f in dumped if "final_bundles.txt" in f.name)
    kinds = re.findall(r"\bvmatmul[\w.]*?\.(bf16|f32|f8\w*)\b", bundles)
    facts = {"matmul": sorted(set(kinds))}
    is_native = facts["matmul"] == ["f8e4m3fn"]
    wrong = None if is_native == (chip == "tpu7x") else f"not what the table of chips says: {facts}"
    report.check("scaled_matmul", "xla", chip, "float8_e4m3fn", facts, wrong)


def check_sharded(report):
    """Rows and columns over four chips: each decodes its own, and gathers nothing."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh([devices[:2], devices[2:]], ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    place = lambda a, *spec: Shape(a.shape, a.dtype, sharding=NamedSharding(mesh, P(*spec)))
    few = {
        "quantized_matmul": (jc.ops.quantized_matmul, QUANTIZED["int4 by 128, 1024 x 4096 x 4096"]),
        "w4a8_matmul": (jc.ops.w4a8_matmul, W4A8["by 128, 1024 x 4096 x 4096"]),
    }
    for op, (function, (args, options)) in few.items():
        x, w, scale = (Shape(a.shape[1:], a.dtype) for a in args[:3])
        run = functools.partial(function, implementation="pallas_tpu", **options)
        program = jax.jit(run).lower(place(x, "x"), place(w, None, "y"), place(scale, None, "y"))
        text = program.compile().as_text()
        wrong = "it gathers" if "all-gather" in text else None
        wrong = wrong if "tpu_custom_call" in text else "the kernel is not there"
        report.check(op, "pallas_tpu", "v5e", "rows and columns sharded", wrong=wrong)


# And the ops that they look at.
CHECKS = {
    check_compiles: KERNELS,
    check_refusals: ("int8_matmul", "quantized_matmul"),
    check_rooflines: ("int8_matmul", "nm_matmul", "quantized_matmul", "w4a8_matmul"),
    check_blocks: ("block_sparse_matmul",),
    check_memory: ("quantized_matmul",),
    check_eight_bit_floats: ("scaled_matmul",),
}


def main():
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    report = Report("expected_tpu.json", versions)
    for chip, topology in TOPOLOGIES.items():
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        for check, ops in CHECKS.items():
            if any(map(report.wants, ops)):
                check(report, chip, described.devices[0])
    if report.wants("quantized_matmul"):
        check_sharded(report)
    report.finish()


if __name__ == "__main__":
    main()
