"""The kernels for TPUs in Pallas' interpreter: a TPU's memories and copies, on the CPU.

Reads out of bounds raise there, memory that nobody wrote is NaN, and two cores that
touch the same memory unordered are found.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from block_sparse_matmul_suite import BlockSparseMatmulSuite
from int8_matmul_suite import Int8MatmulSuite
from jaxcompress.kernels.block_sparse_matmul import pallas_tpu as block_kernel
from jaxcompress.kernels.int8_matmul import pallas_tpu as int8_kernel
from jaxcompress.kernels.nm_matmul import pallas_tpu as nm_kernel
from jaxcompress.kernels.quantized_matmul import pallas_tpu as quantized_kernel
from jaxcompress.kernels.w4a8_matmul import pallas_tpu as w4a8_kernel
from jaxcompress.ops._kernels import CHIPS
from nm_matmul_suite import NMMatmulSuite
from quantized_matmul_suite import QuantizedMatmulSuite
from w4a8_matmul_suite import W4A8MatmulSuite

TPU = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    pltpu.reset_tpu_interpret_mode_state()


def interpreted(kernel, arrays, options):
    options = {name: value for name, value in options.items() if value is not None}
    run = jax.jit(functools.partial(kernel, interpret=TPU, **options))
    got = np.asarray(run(*arrays))
    races = interpret_pallas_call.races  # None where nothing was left to do for a kernel
    assert races is None or not races.races_found
    return got


class TestInt8Matmul(Int8MatmulSuite):
    def run(self, *arrays, **options):
        return interpreted(int8_kernel.int8_matmul, arrays, options)

    def block(self, m, n, k):
        return (min(m, 64) if m < 1000 else 512), min(n, 128), min(k, 256 if k < 2000 else 32_768)


class TestQuantizedMatmul(QuantizedMatmulSuite):
    dtypes = ("float32", "bfloat16")

    def run(self, *arrays, **options):
        return interpreted(quantized_kernel.quantized_matmul, arrays, options)

    def block(self, m, n, k):
        return (min(m, 64) if m < 1000 else 512), min(n, 128), 256


class TestW4A8Matmul(W4A8MatmulSuite):
    dtypes = ("float32", "bfloat16")
    groups = (None, 128, 256)

    def run(self, *arrays, **options):
        return interpreted(w4a8_kernel.w4a8_matmul, arrays, options)

    def block(self, m, n, k, group_size):
        return (min(m, 64) if m < 1000 else 512), min(n, 128), (256 if k < 2000 else 32_768)


class TestBlockSparseMatmul(BlockSparseMatmulSuite):
    dtypes = ("float32", "bfloat16")
    sides = (128, 256)

    def product(self, *arrays, **options):
        return interpreted(block_kernel.block_sparse_matmul, arrays, options)

    def sampled(self, *arrays, **options):
        return interpreted(block_kernel.sampled_matmul, arrays, options)

    def block(self, m):
        return min(m, 64) if m < 1000 else 512


class TestNMMatmul(NMMatmulSuite):
    dtypes = ("float32", "bfloat16", "int8")

    def run(self, *arrays, **options):
        return interpreted(nm_kernel.nm_matmul, arrays, options)

    def block(self, m, n):
        return (min(m, 64) if m < 1000 else 512), min(n, 128), 256


KERNELS = [block_kernel, int8_kernel, nm_kernel, quantized_kernel, w4a8_kernel]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_tables_have_the_chips_that_are_proven(kernel):
    assert set(kernel.BLOCKS) == {"default", *CHIPS["tpu"]}


@pytest.mark.parametrize("chip", [None, *CHIPS["tpu"]])
@pytest.mark.parametrize("k", [1, 64, 1000, 4096, 11008, 5000])
def test_blocks_are_tiles_or_whole(chip, k):
    """A block has full tiles of 32 x 128 (int8) or is the whole of the dimension."""
    for m, n in ((1, 7), (4096, 4096)):
        block_m, block_n, block_k = int8_kernel.blocks(m, n, k, chip)
        assert block_m == m or block_m % 32 == 0
        assert block_n == n or block_n % 128 == 0
        assert block_k == k or block_k % 128 == 0
        assert block_k <= 1024
        for kernel, group in itertools.product(
            (quantized_kernel, w4a8_kernel), (None, 32, 128, 2048)
        ):
            _, _, block_k = kernel.blocks(m, n, k, group, chip)
            assert block_k % 64 == 0
            assert group is None or block_k % group == 0 or group % block_k == 0
            assert block_k >= k or block_k % 256 == 0
