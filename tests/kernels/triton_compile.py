"""Compiles the kernels for nine GPUs, without one, and reads the machine code.

python tests/kernels/triton_compile.py [--write] [OP ...]: down to the code for NVIDIA's (ptxas) and
AMD's (LLVM) chips. Is the tensor-core instruction there, do registers spill, does a block
fit the chip? That is evidence of the code, not of its speed: nothing runs. `--write` makes
expected_triton.json anew.
"""

import functools
import importlib.metadata
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import jax
import jax.numpy as jnp
import triton
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
from jaxcompress.kernels.block_sparse_matmul import triton as block_kernel
from jaxcompress.kernels.int8_matmul import triton as int8_kernel
from jaxcompress.kernels.nm_matmul import triton as nm_kernel
from jaxcompress.kernels.nm_matmul import triton_sparse as sparse_kernel
from jaxcompress.kernels.quantized_matmul import triton as quantized_kernel
from jaxcompress.kernels.w4a8_matmul import triton as w4a8_kernel
from jaxcompress.ops._kernels import call_kernel
from roofline import of_triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "int32": "i32",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
}
# Bytes of shared memory that a block may have: NVIDIA's programming guide, AMD's LDS.
SHARED = {
    "8.0": 163,
    "8.6": 99,
    "8.9": 99,
    "9.0": 227,
    "10.0": 227,
    "12.0": 99,
    "gfx90a": 64,
    "gfx942": 64,
    "gfx950": 160,
}


INT8 = {
    "4096 x 4096 x 4096": int8_case(4096, 4096, 4096),
    "4096 x 4096 x 4096, w[n, k]": int8_case(4096, 4096, 4096, transpose_w=True),
    "1024 x 4096 x 4096, bias, gelu, int8": int8_case(1024, 4096, 4096, codes=True),
    "129 x 1000 x 1000, zero points": int8_case(129, 1000, 1000, zero=True),
}
QUANTIZED = {
    "int8, 16 x 4096 x 4096": quantized_case(16, 4096, 4096, 8),
    "int4 by 128, 16 x 4096 x 4096": quantized_case(16, 4096, 4096, 4, 128),
    "int3 by 64, 1 x 11008 x 4096": quantized_case(1, 11008, 4096, 3, 64),
    "int2 by 32, zero points, 16 x 4096 x 4096": quantized_case(16, 4096, 4096, 2, 32, zero=True),
    "int4 by 128, 1024 x 4096 x 4096": quantized_case(1024, 4096, 4096, 4, 128),
    "int4 by 32, float16, 129 x 5000 x 1000": quantized_case(
        129, 5000, 1000, 4, 32, dtype="float16"
    ),
}
W4A8 = {
    "by 128, 16 x 4096 x 4096": w4a8_case(16, 4096, 4096, 128),
    "by 128, 1024 x 4096 x 4096": w4a8_case(1024, 4096, 4096, 128),
    "by 32, zero points, 129 x 5000 x 1000": w4a8_case(129, 5000, 1000, 32, zero=True),
}
BLOCKS = {
    "128x128, 4096 x 4096 x 4096": block_case(4096, 4096, 4096, (128, 128)),
    "32x32, int8, 16 x 4096 x 4096": block_case(16, 4096, 4096, (32, 32), weights="int8"),
    "64x64, turned, 4096 x 4096 x 4096": block_case(4096, 4096, 4096, (64, 64), turned=True),
    "48x16, float16, 129 x 1000 x 1000": block_case(129, 1000, 1000, (48, 16), dtype="float16"),
}
SAMPLED = {
    "128x128, 4096 x 4096 x 4096": sampled_case(4096, 4096, 4096, (128, 128)),
    "48x16, float16, 129 x 1000 x 1000": sampled_case(129, 1000, 1000, (48, 16), "float16"),
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
    "4:8, float16, 129 x 5000 x 1000": nm_case(129, 5000, 1000, (4, 8), dtype="float16"),
}
KERNELS = {
    "block_sparse_matmul": (block_kernel.block_sparse_matmul, BLOCKS),
    "sampled_matmul": (block_kernel.sampled_matmul, SAMPLED),
    "int8_matmul": (int8_kernel.int8_matmul, INT8),
    "nm_matmul": (nm_kernel.nm_matmul, NM),
    "quantized_matmul": (quantized_kernel.quantized_matmul, QUANTIZED),
    "w4a8_matmul": (w4a8_kernel.w4a8_matmul, W4A8),
}

INTEGER = ("int8_matmul", "w4a8_matmul")


def compiled(kernel, args, options, chip, block=None):
    """What Triton makes of the launch that `kernel` asks for."""
    made = []

    def compile_only(*operands, kernel, out_shape, grid, num_warps, num_stages, **constants):
        arrays = dict(zip(kernel.arg_names, (*operands, out_shape)))
        signature = {name: "*" + NAMES[str(a.dtype)] for name, a in arrays.items()}
        # jax_triton promises as much: arrays of JAX are aligned to 16 bytes at least.
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        target = (
            GPUTarget("hip", chip, 64)
            if chip.startswith("gfx")
            else GPUTarget("cuda", int(chip.replace(".", "")), 32)
        )
        with_ = dict(num_warps=num_warps, num_stages=num_stages)
        made.append((triton.compile(source, target=target, options=with_), num_warps))
        return jnp.zeros(out_shape.shape, out_shape.dtype)

    cut = {} if block is None else {"block": block}
    run = functools.partial(kernel, chip=chip, interpret=compile_only, **cut, **options)
    jax.eval_shape(run, *args)
    [result] = made
    return result


def facts_of(binary, warps, chip):
    """The matrix instructions, registers a thread, spills, and shared memory in bytes."""
    if chip.startswith("gfx"):
        text = binary.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}: +(\d+)", text).group(1))
        return {
            "matmul": sorted(set(re.findall(r"\bv_mfma_\w+", text))),
            "registers": number("vgpr_count"),
            "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
            "shared": binary.metadata.shared,
            "warps": warps,
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        ask = lambda *command: (
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
        usage = ask(TOOLS / "cuobjdump", "-res-usage", file.name)
        text = ask(TOOLS / "nvdisasm", file.name)
    return {
        "matmul": sorted(
            set(re.findall(r"\b(?:IMMA|IGMMA|HMMA|HGMMA|UTC\w*MMA)(?:\.SP)?\b", text))
        ),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "shared": binary.metadata.shared,
        "warps": warps,
    }


def verdict(op, facts, chip):
    integer = ("IMMA", "IGMMA", "UTCIMMA", "v_mfma_i32") if op in INTEGER else ("",)
    if not any(name.startswith(integer) for name in facts["matmul"]):
        return f"no tensor-core instruction: {facts}"
    if facts["spills"]:
        return f"registers are spilled: {facts}"
    if facts["shared"] > SHARED[chip] * 1024:
        return f"more shared memory than {chip} gives a block: {facts}"
    if not chip.startswith("gfx") and facts["registers"] * facts["warps"] * 32 > 65536:
        return f"more registers than {chip} has: {facts}"
    return None


def check_compiles(report, chip):
    for op, (kernel, cases) in KERNELS.items():
        if not report.wants(op):
            continue
        for case, (args, options) in cases.items():
            binary, warps = compiled(kernel, args, options, chip)
            facts = facts_of(binary, warps, chip)
            report.check(op, "triton", chip, case, facts, verdict(op, facts, chip))


def check_sparse(report, chip):
    """The sparse tensor cores, by inline PTX: what a thread holds is what the kernel says.

    It counts on one number a thread, in their order, and that none moves to another one.
    """
    cases = {
        "bfloat16": ("HMMA.SP", nm_case(16, 4096, 4096)),
        "int8": ("IMMA.SP", nm_case(16, 4096, 4096, dtype="int8")),
        "int8 scaled": ("IMMA.SP", nm_case(16, 4096, 4096, dtype="int8", scaled=True)),
    }
    for kind, (name, (args, options)) in cases.items():
        options = {"dtype": options["dtype"]}
        binary, warps = compiled(sparse_kernel.nm_matmul, args, options, chip)
        facts = facts_of(binary, warps, chip)
        wrong = verdict("nm_matmul", facts, chip)
        if facts["matmul"] != [name]:
            wrong = f"not {name}: {facts}"
        text = binary.asm["ttgir"]
        layouts = re.findall(r"#ttg.blocked<(.*)>", text)
        plain = (
            f"{{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [{warps}], order = [0]}}"
        )
        if layouts != [plain] or "convert_layout" in text:
            wrong = f"numbers lie otherwise: {layouts}"
        report.check("nm_matmul", "triton_sparse", chip, f"2:4, {kind}", facts, wrong)


def lowered(fn, *args):
    """The program for an NVIDIA GPU; jax_triton compiles the kernel for it on the way."""
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def check_launches(report, chip):
    """Through jax_triton, as on a device: `vmap` and `shard_map` around it."""
    args, options = int8_case(129, 256, 256)
    run = functools.partial(int8_kernel.int8_matmul, chip=chip, **options)
    wrong = None if "triton_kernel_call" in lowered(run, *args) else "no kernel"
    report.check("int8_matmul", "triton", chip, "called by jax_triton", wrong=wrong)

    args, options = w4a8_case(16, 512, 256, 64)
    run = functools.partial(w4a8_kernel.w4a8_matmul, chip=chip, **options)
    wrong = None if "triton_kernel_call" in lowered(run, *args) else "no kernel"
    report.check("w4a8_matmul", "triton", chip, "called by jax_triton", wrong=wrong)

    args, options = nm_case(16, 512, 256)
    run = functools.partial(nm_kernel.nm_matmul, chip=chip, **options)
    wrong = None if "triton_kernel_call" in lowered(run, *args) else "no kernel"
    report.check("nm_matmul", "triton", chip, "called by jax_triton", wrong=wrong)

    args, options = nm_case(16, 512, 256, dtype="int8")
    del options["pattern"]
    run = functools.partial(sparse_kernel.nm_matmul, chip=chip, **options)
    wrong = None if "triton_kernel_call" in lowered(run, *args) else "no kernel"
    report.check("nm_matmul", "triton_sparse", chip, "called by jax_triton", wrong=wrong)

    args, options = block_case(16, 512, 256, (32, 32))
    run = functools.partial(block_kernel.block_sparse_matmul, chip=chip, **options)
    wrong = None if "triton_kernel_call" in lowered(run, *args) else "no kernel"
    report.check("block_sparse_matmul", "triton", chip, "called by jax_triton", wrong=wrong)

    args, options = quantized_case(16, 512, 256, 4, 64)
    run = functools.partial(quantized_kernel.quantized_matmul, chip=chip, **options)
    around = functools.partial(call_kernel, run, ("bmk", "bpn", "bgn"))
    mapped = jax.vmap(around, (0, None, None))
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,))
    placed = jax.shard_map(mapped, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P("x"))
    x = Shape((3, *args[0].shape), args[0].dtype)
    wrong = None if "triton_kernel_call" in lowered(placed, x, *args[1:]) else "no kernel"
    report.check(
        "quantized_matmul", "triton", chip, "called by jax_triton, mapped, sharded", wrong=wrong
    )


def check_that_spills_are_seen(report):
    """A tile of 128 x 128 with four warps is too much for sm_80: the check has to say so."""
    args, options = INT8["4096 x 4096 x 4096"]
    tile = int8_kernel.Blocks(128, 256, 64, 4, 3)
    binary, warps = compiled(int8_kernel.int8_matmul, args, options, "8.0", tile)
    found = verdict("int8_matmul", facts_of(binary, warps, "8.0"), "8.0")
    wrong = None if found and "spilled" in found else f"not seen: {found}"
    report.check("int8_matmul", "triton", "8.0", "refused, a tile that spills", wrong=wrong)


def check_rooflines(report):
    for chip in ("sm_80", "sm_90"):
        args, _ = INT8["4096 x 4096 x 4096"]
        out = Shape((4096, 4096), jnp.bfloat16)
        line = of_triton(args[:2], out, 2 * 4096**3, chip, "int8")
        wrong = None if line.intensity > line.ridge else f"bound by memory: {line}"
        facts = {"operations a byte": round(line.intensity), "ridge": round(line.ridge)}
        report.check("int8_matmul", "triton", chip, "roofline, 4096 x 4096 x 4096", facts, wrong)


def main():
    versions = {name: importlib.metadata.version(name) for name in ("jax", "triton")}
    report = Report("expected_triton.json", versions)
    for chip in SHARED:
        check_compiles(report, chip)
        if not chip.startswith("gfx") and report.wants("nm_matmul"):
            check_sparse(report, chip)
    if report.wants("int8_matmul"):
        check_that_spills_are_seen(report)
        check_rooflines(report)
    # Last, as jax_triton takes Triton's cache folder away when it is imported; and not for
    # AMD, where it asks a device for its name.
    for chip in SHARED:
        if not chip.startswith("gfx") and all(map(report.wants, KERNELS)):
            check_launches(report, chip)
    report.finish()


if __name__ == "__main__":
    main()
