"""Our kernels for TPUs beside JAX's own Pallas matmul, at the same tile: bundles of the inner body.

python tests/kernels/tpu_peers.py [--write]: libtpu compiles both for four chips. The inner
body is what runs for each tile: the bundles, between labels and branches, that have a
matrix instruction. JAX's rounds its sums to the result in every step, ours in the last; ours
decodes a weight in a piece of its own, which only the bundles of all count. That is
evidence of the code, not of its speed: a bundle may wait, and nothing runs.
`--write` makes expected_peers.json anew.
"""

import importlib.metadata
import re

import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.matmul import matmul

import tpu_compile  # it sets what libtpu reads when it starts
from cases import Shape, block_case, quantized_case
from expected import Report

M, K, N = 1024, 2048, 1024


def floats(kind):
    return [Shape((1, M, K), kind), Shape((1, K, N), kind)]


def jax_matmul(x, w, *, chip, block, dtype):
    """JAX's: a block is spelled out whole."""
    return matmul(x[0], w[0], block_shape=block[:2], block_k=block[2], out_dtype=dtype)


def cut(kernel, case, block):
    args, options = case
    return kernel, args, {**options, "block": block}


# A tile (m, n, k) that none of ours cuts further, and who makes the product of it.
TILES = {
    "int8 x int8, 128 x 256 x 512": {
        "int8_matmul": (
            tpu_compile.int8_kernel.int8_matmul,
            floats(jnp.int8),
            dict(block=(128, 256, 512)),
        ),
        "jax": (jax_matmul, floats(jnp.int8), dict(block=(128, 256, 512), dtype=jnp.int32)),
    },
    "bfloat16, 128 x 256 x 512": {
        "block_sparse_matmul": cut(
            tpu_compile.block_kernel.block_sparse_matmul, block_case(M, K, N, (512, 256)), 128
        ),
        "jax": (
            jax_matmul,
            floats(jnp.bfloat16),
            dict(block=(128, 256, 512), dtype=jnp.bfloat16),
        ),
    },
    "int4 by 128, 64 x 256 x 256": {
        "quantized_matmul": cut(
            tpu_compile.quantized_kernel.quantized_matmul,
            quantized_case(M, K, N, 4, 128),
            (64, 256, 256),
        ),
        "jax": (
            jax_matmul,
            floats(jnp.bfloat16),
            dict(block=(64, 256, 256), dtype=jnp.bfloat16),
        ),
    },
}
_LABEL = re.compile(r"\s*0x[0-9a-f]+\s+(?:P[BF]|L[BHE]):")
_BUNDLE = re.compile(r"\s*0x[0-9a-f]+\s")


def bodies(text):
    """The bundles of each straight piece of a schedule that has a matrix instruction."""
    pieces, here = [], []
    for line in text.splitlines():
        if not _BUNDLE.match(line):
            continue
        if _LABEL.match(line):
            pieces.append(here)
            here = []
        here.append(line)
        if "sbr.rel" in line:
            pieces.append(here)
            here = []
    pieces.append(here)
    return [len(p) for p in pieces if any("vmatmul" in line for line in p)]


def scheduled(kernel, args, options, device):
    """The schedule of a kernel's body, and its facts."""
    op = "matmul" if kernel is jax_matmul else kernel.__name__
    files = tpu_compile.compiled(kernel, args, options, device)
    [file] = [f for f in files if re.search(rf"\d-{op}[.\d]*-\d+-final_bundles.txt", f.name)]
    return file.read_text(), tpu_compile.schedule(op, files)


def bundles(kernel, args, options, device):
    text, facts = scheduled(kernel, args, options, device)
    return {"body": sum(bodies(text)), "all": facts["bundles"]}


def check_peers(report, chip, device):
    for tile, makers in TILES.items():
        facts = {name: bundles(*made, device) for name, made in makers.items()}
        ours, theirs = (f["body"] for f in facts.values())
        wrong = f"more bundles than JAX's own kernel: {facts}" if ours > theirs else None
        [op, _] = makers
        report.check(op, "pallas_tpu", chip, f"beside JAX's, {tile}", facts, wrong)


def main():
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    report = Report("expected_peers.json", versions)
    for chip, topology in tpu_compile.TOPOLOGIES.items():
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        check_peers(report, chip, described.devices[0])
    report.finish()


if __name__ == "__main__":
    main()
