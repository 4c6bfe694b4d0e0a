"""Compiles whole programs for NVIDIA's GPUs with XLA, without one, and reads what it made.

python tests/kernels/xla_gpu_compile.py [--write]: a transformer block whose weights are
compressed, as a process with that GPU would compile it. Are our kernels in it, or XLA's own
product of small numbers? Does a weight become floats, how much memory is asked for? Nothing
runs, and nothing is tuned: with a device XLA measures its products and takes the fastest.
`--write` makes expected_xla_gpu.json anew.
"""

import dataclasses
import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as by_triton

import jaxcompress as jc
import xla_gpu
from cases import Shape
from expected import Report

TOKENS, WIDTH, HIDDEN, HEADS = 48, 512, 1024, 8
SHAPES = {
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
ALL = 2 * sum(k * n for k, n in SHAPES.values())  # bytes in bfloat16
X = jnp.zeros((TOKENS, WIDTH), jnp.bfloat16)
CUBLAS = dict(xla_gpu_enable_triton_gemm=False)


def block(p, x):
    """A transformer block: attention and two layers, each beside what came in."""
    split = (x @ p["qkv"]).reshape(TOKENS, 3, HEADS, -1)
    mixed = jax.nn.dot_product_attention(*split.swapaxes(0, 1)[:, None])
    x = x + mixed.reshape(TOKENS, WIDTH) @ p["out"]
    return x + jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]


def weights(spec, pattern=None, sparsity=1.0):
    rng = np.random.default_rng(0)
    dense = {n: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for n, s in SHAPES.items()}
    params = jc.quantize.quantize(dense, {".*": spec})
    if pattern is not None:
        scores = jax.tree.map(lambda a: jnp.abs(a.astype(jnp.float32)), dense)
        masks = jc.prune.mask(scores, pattern, sparsity)
        params = jc.prune.pack(params, masks, pattern=pattern)
    return params | {"bias": jnp.zeros(HIDDEN, jnp.bfloat16)}


def programs():
    """The weights, by name: first what our kernels multiply, then what XLA does."""
    float8 = jc.quantize.fp8_e4m3()
    kernels = {
        "w4a16 by 128": weights(jc.quantize.w4a16(group_size=128)),
        "w4a8 by 128": weights(jc.quantize.w4a8(group_size=128)),
        "2:4, int8": weights(jc.quantize.int8(), jc.prune.nm(2, 4, axis=-2)),
        "blocks of 64 x 64, int8": weights(jc.quantize.int8(), jc.prune.block(64, 64), 0.75),
    }
    products = {
        "w8a8": weights(jc.quantize.w8a8()),
        "float8 on both sides": weights(
            dataclasses.replace(float8, act=jc.arrays.Activation(float8.qtype))
        ),
    }
    return kernels, products


def facts_of(program, **options):
    """Calls, kinds of matrix instructions of XLA's own code, and what becomes of memory."""
    made, ptx = xla_gpu.compiled(program, **options)
    text = made.as_text()
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    return {
        "calls": {name: calls.count(name) for name in sorted(set(calls))},
        "matmul": sorted(set(re.findall(r"\bw?g?mma\.\S*?\.([suf]\d+\.\w+\.\w+)[.\s]", ptx))),
        "float weights": len(set(float_weights(text))),
        "temporary": made.memory_analysis().temp_size_in_bytes,
    }


def float_weights(text):
    """Arrays of floats as large as a weight, and not of activations, which have the tokens."""
    for kind, sizes in re.findall(r"\b(bf16|f16|f32)\[([\d,]+)\]", text):
        sizes = [int(size) for size in sizes.split(",")]
        if TOKENS not in sizes and np.prod(sizes) >= WIDTH * WIDTH:
            yield f"{kind}{sizes}"


def check_kernels(report, chip, device, params, case):
    """Weights that our kernels multiply stay as they are stored."""
    with xla_gpu.at_hand(device):
        said = {row.implementation for row in jc.explain(block, params, X, platform="cuda")}
        program = xla_gpu.lowered(jc.accelerate(block), (params, X), device)
    facts = facts_of(program)
    wrong = None if said == {"triton"} else f"jc.explain says {said}"
    if facts["calls"] != {"triton_kernel_call": len(SHAPES)}:
        wrong = f"not one kernel a weight: {facts}"
    if facts["float weights"]:
        wrong = f"a weight becomes floats: {facts}"
    if facts["temporary"] > ALL / 3:
        wrong = f"as much memory as weights: {facts}"
    report.check("transformer_block", "triton", chip.capability, case, facts, wrong)


def check_products(report, chip, device, params, case):
    """Weights that XLA multiplies itself, by its own code and by cuBLAS."""
    is_float8 = case.startswith("float8")
    is_there = not is_float8 or chip.capability != "8.0"
    expected = "xla" if is_float8 and is_there else "reference"
    with xla_gpu.at_hand(device):
        said = {row.implementation for row in jc.explain(block, params, X, platform="cuda")}
        program = xla_gpu.lowered(jc.accelerate(block), (params, X), device)
    wrong = None if said == {expected} else f"jc.explain says {said}"
    own, cublas = facts_of(program), facts_of(program, **CUBLAS)
    for name, facts in (("XLA's own code", own), ("cuBLAS", cublas)):
        if bool(facts["float weights"]) == is_there:
            wrong = f"floats of weights, or none: {facts}"
        if not is_float8 and not {"s32.s8.s8"} & {*facts["matmul"]} and not facts["calls"]:
            wrong = f"no product of integers: {facts}"
        report.check("transformer_block", "xla", chip.capability, f"{case}, {name}", facts, wrong)


def check_refusals(report, chip, device):
    """A tile that no multiprocessor has the memory for; and the check itself."""
    dot = lambda x, w, out: out.__setitem__(..., jnp.dot(x[...], w[...]))
    large = Shape((512, 512), jnp.bfloat16)
    product = pl.pallas_call(dot, out_shape=large, compiler_params=by_triton.CompilerParams())
    product = xla_gpu.lowered(product, (large, large), device)
    try:
        xla_gpu.compiled(product)
        wrong = "it is compiled"
    except jax.errors.JaxRuntimeError as error:
        wrong = None if "Shared memory size limit exceeded" in str(error) else str(error)
    report.check("matmul", "xla", chip.capability, "refused, a tile of 512 x 512", wrong=wrong)


def check_that_floats_are_seen(report, chip, device, params, case):
    """Without a GPU at hand XLA decodes the weights, and the check has to say so."""
    facts = facts_of(xla_gpu.lowered(jc.accelerate(block), (params, X), device))
    wrong = None if facts["float weights"] else f"not seen: {facts}"
    report.check("transformer_block", "xla", chip.capability, f"{case}, decoded", wrong=wrong)


def main():
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-cuda13-plugin")}
    report = Report("expected_xla_gpu.json", versions)
    kernels, products = programs()
    for chip in xla_gpu.CHIPS:
        device = xla_gpu.described(chip)
        for case, params in kernels.items():
            check_kernels(report, chip, device, params, case)
        for case, params in products.items():
            check_products(report, chip, device, params, case)
        check_refusals(report, chip, device)
    case = "w4a16 by 128"
    check_that_floats_are_seen(report, chip, device, kernels[case], case)
    report.finish()


if __name__ == "__main__":
    main()
