"""Our kernels for TPUs beside tokamax's grouped product of one group, at the same tile.

python tests/kernels/tokamax_peers.py [--write]: as tpu_peers.py, for `gmm`, which
`tokamax.ragged_dot` calls on TPUs; in an environment that has tokamax too, so not a part
of `make test-kernels`. Its inner body is there twice, for the last step along k and for
the others: the shorter one is counted, which the others run. `--write` makes
expected_tokamax.json anew.
"""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from qwix import QArray
from tokamax._src import mosaic_tpu
from tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel import gmm

import tpu_compile  # it sets what libtpu reads when it starts
from cases import Shape, int8_case
from expected import Report
from tpu_peers import TILES, K, M, N, bodies, cut, scheduled


def gmm_megablox(x, w, sizes, x_scale=None, w_scale=None, *, chip, block, dtype):
    """`gmm` of `x[m, k]` and `w[1, k, n]`, with the scales of quantized ones."""
    x = x if x_scale is None else QArray(x, x_scale)
    w = w if w_scale is None else QArray(w, w_scale)
    tm, tn, tk = block
    return gmm(x, w, sizes, None, jnp.dtype(dtype), tiling=(tm, tk, tn))


def one_group(kind, weights, block, *, scales=()):
    shapes = [Shape((M, K), kind), Shape((1, K, N), weights), Shape((1,), jnp.int32), *scales]
    return gmm_megablox, shapes, dict(block=block, dtype=jnp.bfloat16)


def float32(*shape):
    return Shape(shape, jnp.float32)


PEERS = {
    "int8 x int8 scaled, 128 x 256 x 512": {
        "int8_matmul": cut(
            tpu_compile.int8_kernel.int8_matmul, int8_case(M, K, N), (128, 256, 512)
        ),
        "tokamax": one_group(
            jnp.int8, jnp.int8, (128, 256, 512), scales=(float32(M, 1), float32(1, 1, N))
        ),
    },
    "bfloat16, 128 x 256 x 512": {
        "block_sparse_matmul": TILES["bfloat16, 128 x 256 x 512"]["block_sparse_matmul"],
        "tokamax": one_group(jnp.bfloat16, jnp.bfloat16, (128, 256, 512)),
    },
    "int4 by 128, 64 x 256 x 256": {
        "quantized_matmul": TILES["int4 by 128, 64 x 256 x 256"]["quantized_matmul"],
        "tokamax": one_group(
            jnp.bfloat16, jnp.int4, (64, 256, 256), scales=(None, float32(1, K // 128, N))
        ),
    },
}


def bundles(kernel, args, options, device):
    text, facts = scheduled(kernel, args, options, device)
    count = min if kernel is gmm_megablox else sum
    return {"body": count(bodies(text)), "all": facts["bundles"]}


def main():
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu", "tokamax")}
    report = Report("expected_tokamax.json", versions)
    for chip, topology in tpu_compile.TOPOLOGIES.items():
        device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
        mosaic_tpu._adaptive_sublane_size.cache_clear()  # it is of the chip
        for tile, makers in PEERS.items():
            with jax.set_mesh(Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,))):
                facts = {name: bundles(*made, device) for name, made in makers.items()}
            [op, _] = makers
            report.check(op, "pallas_tpu", chip, f"beside tokamax's, {tile}", facts)
    report.finish()


if __name__ == "__main__":
    main()
